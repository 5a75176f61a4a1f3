"""permessage-deflate for `StableWebSocketProtocol`, without context takeover.

The `websockets` library negotiates the extension, but its inflater stops at a final block (BFINAL) and silently
truncates the message. RFC 7692 section 7.2.3.4 allows such blocks, and further blocks after them.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, Final

from websockets.exceptions import NegotiationError
from websockets.extensions.permessage_deflate import ServerPerMessageDeflateFactory

from fastapi_ws_stabilizer.wire.deflate import TAIL, InflateLimitError

_WINDOW: Final = 1 << 15

LEAST_WINDOW_BITS: Final = 9
"""Minimum window. zlib can inflate data compressed with a window of 8 bits, but cannot compress with one."""

MAX_FINAL_BLOCKS: Final = 16
"""Maximum number of final blocks in one message. Each costs a new inflater, and a message can contain very many empty
ones."""


class MessageInflater:
    """Inflater of one message, which takes its bytes as they arrive."""

    __slots__ = ("_final_blocks", "_inflater", "_window", "_window_bits")

    def __init__(self, window_bits: int) -> None:
        self._window_bits = window_bits
        self._inflater = zlib.decompressobj(wbits=-window_bits)
        self._final_blocks = 0
        self._window = b""

    def inflate(self, compressed: bytes, max_bytes: int, *, last: bool) -> bytes:
        """Inflate the next bytes of the message.

        Args:
            compressed: The bytes.
            max_bytes: Maximum size of the result in bytes.
            last: Whether they are the last of the message.

        Raises:
            InflateLimitError: They inflate to more than `max_bytes` bytes.
            ValueError: They are invalid.
        """
        if last:
            compressed += TAIL
        data = b""
        try:
            while True:
                # One byte more than the limit reveals an excess; 0 would mean no limit.
                inflated = self._inflater.decompress(compressed, max(1, max_bytes - len(data) + 1))
                data += inflated
                if len(data) > max_bytes:
                    raise InflateLimitError(f"more than {max_bytes} bytes")
                self._window = (self._window + inflated)[-_WINDOW:]
                if not self._inflater.eof:
                    return data
                compressed = self._inflater.unused_data
                self._final_blocks += 1
                if self._final_blocks > MAX_FINAL_BLOCKS:
                    raise ValueError("too many final blocks in one message")
                # The next block may refer to earlier data.
                self._inflater = zlib.decompressobj(wbits=-self._window_bits, zdict=self._window)
        except zlib.error as error:
            raise ValueError("decompression failed") from error


class _DeflateFactory(ServerPerMessageDeflateFactory):
    def process_request_params(self, params: Any, accepted_extensions: Sequence[Any]) -> Any:
        answer, negotiated = super().process_request_params(params, accepted_extensions)
        if (
            negotiated.local_max_window_bits < LEAST_WINDOW_BITS
        ):  # websockets before 17 accepts, and every send would fail
            raise NegotiationError(f"zlib needs a window of at least {LEAST_WINDOW_BITS} bits to compress")
        return answer, negotiated


DEFLATE: Final = _DeflateFactory(server_no_context_takeover=True, client_no_context_takeover=True)
