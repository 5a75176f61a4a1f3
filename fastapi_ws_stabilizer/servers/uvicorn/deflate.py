"""permessage-deflate for `StableWebSocketProtocol`, without context takeover.

The `websockets` library negotiates the extension, but its inflater stops at a final block (BFINAL) and silently
truncates the message. RFC 7692 section 7.2.3.4 allows such blocks, and further blocks after them.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, Final

from websockets.exceptions import NegotiationError, PayloadTooBig, ProtocolError
from websockets.extensions.permessage_deflate import PerMessageDeflate, ServerPerMessageDeflateFactory
from websockets.frames import Frame, Opcode

from fastapi_ws_stabilizer.wire.deflate import TAIL

_WINDOW: Final = 1 << 15

LEAST_WINDOW_BITS: Final = 9
"""Minimum window. zlib can inflate data compressed with a window of 8 bits, but cannot compress with one."""

MAX_FINAL_BLOCKS: Final = 16
"""Maximum number of final blocks in one message. Each costs a new inflater, and a message can contain very many empty
ones."""


class WholeMessageDeflate(PerMessageDeflate):
    """Extension that inflates each message separately, past final blocks and up to the limit."""

    inflater: Any
    inflating = False
    final_blocks = 0
    window = b""

    def decode(self, frame: Frame, *, max_size: int | None = None) -> Frame:
        """Inflate one frame.

        Raises:
            PayloadTooBig: The frame inflates to more than `max_size` bytes.
            ProtocolError: The compressed data is invalid.
        """
        if frame.opcode is Opcode.CONT:
            if not self.inflating:
                return frame
            if frame.rsv1:
                raise ProtocolError("RSV1 bit set in continuation frame")
        elif frame.opcode not in (Opcode.TEXT, Opcode.BINARY) or not frame.rsv1:
            return frame
        else:
            self.inflater = zlib.decompressobj(wbits=-self.remote_max_window_bits)
            self.final_blocks = 0
        try:
            data = self._inflate(bytes(frame.data) + (TAIL if frame.fin else b""), max_size)
        except zlib.error as error:
            raise ProtocolError("decompression failed") from error
        self.inflating = not frame.fin
        if frame.fin:
            self.inflater, self.window = None, b""
        else:
            self.window = (self.window + data)[-_WINDOW:]
        return Frame(frame.opcode, data, frame.fin, False, frame.rsv2, frame.rsv3)

    def _inflate(self, compressed: bytes, max_size: int | None) -> bytes:
        data = b""
        while True:
            # One byte more than the limit reveals an excess; 0 would mean no limit.
            max_bytes = 0 if max_size is None else max_size - len(data) + 1
            inflated: bytes = self.inflater.decompress(compressed, max_bytes)
            data += inflated
            if max_size is not None and len(data) > max_size:
                raise PayloadTooBig(None, max_size)
            if not self.inflater.eof:
                return data
            compressed = self.inflater.unused_data
            self.final_blocks += 1
            if self.final_blocks > MAX_FINAL_BLOCKS:
                raise ProtocolError("too many final blocks in one message")
            # The next block may refer to earlier data.
            self.inflater = zlib.decompressobj(
                wbits=-self.remote_max_window_bits, zdict=(self.window + data)[-_WINDOW:]
            )


class _DeflateFactory(ServerPerMessageDeflateFactory):
    def process_request_params(self, params: Any, accepted_extensions: Sequence[Any]) -> Any:
        answer, negotiated = super().process_request_params(params, accepted_extensions)
        if (
            negotiated.local_max_window_bits < LEAST_WINDOW_BITS
        ):  # websockets before 17 accepts, and every send would fail
            raise NegotiationError(f"zlib needs a window of at least {LEAST_WINDOW_BITS} bits to compress")
        return answer, WholeMessageDeflate(
            negotiated.remote_no_context_takeover,
            negotiated.local_no_context_takeover,
            negotiated.remote_max_window_bits,
            negotiated.local_max_window_bits,
            self.compress_settings,
        )


DEFLATE: Final = _DeflateFactory(server_no_context_takeover=True, client_no_context_takeover=True)
"""Without context takeover a message is compressed once for all recipients. An idle connection holds no compressor."""
