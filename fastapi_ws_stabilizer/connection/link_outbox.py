"""The outbox of a connection whose server hands us its transport: what one turn has queued is one write."""

from __future__ import annotations

from typing import Final

from fastapi_ws_stabilizer.connection.outbox import Outbox, OutboxLimits, OutboxOwner
from fastapi_ws_stabilizer.hub.turns import Turns
from fastapi_ws_stabilizer.servers.link import Link

MAX_WRITE_BYTES: Final = 256 * 1024
"""Bytes that are joined to one write. After each the transport is asked whether it has had enough, so this and its
high-water mark bound what it holds."""


class LinkOutbox(Outbox):
    """Writes prepared frames to the transport of a `Link`.

    Args:
        link: Where to write.
        min_bytes: Messages below this size are not compressed.
    """

    __slots__ = ("_link", "_min_bytes", "_window_bits")

    def __init__(
        self, owner: OutboxOwner, limits: OutboxLimits, turns: Turns, shard: int, *, link: Link, min_bytes: int
    ) -> None:
        super().__init__(owner, limits, turns, shard)
        self._link = link
        self._window_bits = link.window_bits
        self._min_bytes = min_bytes

    def _carry(self) -> None:
        """Hot path: of a broadcast's cost, what is here and below it is nearly all."""
        link = self._link
        bits = self._window_bits
        while self._queue or self._urgent:
            if link.write_paused:
                self._block()
                return
            frames = self._take(MAX_WRITE_BYTES)
            if bits:
                parts = [frame.compressed(bits, self._min_bytes) for frame in frames]
            else:
                parts = [frame.framed() for frame in frames]
            try:
                link.write(parts[0] if len(parts) == 1 else b"".join(parts))
            except Exception as error:  # whatever the transport raises, it takes nothing any more
                self._failed(error, len(frames))
                return
            self._owner.sent(len(frames))
        self._calm_down()
        if self._close is not None:  # a few bytes, which a transport takes even when it has had enough
            close, self._close = self._close, None
            link.close(*close)
        if self._shut:
            self._set_done()

    def finish(self, code: int, text: str, *, flush: bool) -> int:
        """As every outbox; what need not wait for the client is done at once."""
        discarded = super().finish(code, text, flush=flush)
        if not flush and not self._broken:
            self._carry()
        return discarded

    def writable(self) -> None:
        """The transport takes more again."""
        self._unblock()
        if not self._broken:
            self._carry()
