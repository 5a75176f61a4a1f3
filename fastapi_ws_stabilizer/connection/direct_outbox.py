"""The outbox of a connection whose server hands us its transport: what one turn has queued is one write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from fastapi_ws_stabilizer.connection.outbox import Outbox
from fastapi_ws_stabilizer.connection.outbox_owner import OutboxOwner
from fastapi_ws_stabilizer.connection.send_queue import OutboxLimits
from fastapi_ws_stabilizer.scheduling import FlushScheduler
from fastapi_ws_stabilizer.servers.direct import DirectTransport
from fastapi_ws_stabilizer.wire.envelope import to_deflated

MAX_WRITE_BYTES: Final = 256 * 1024
"""Bytes that are joined to one write. After each the transport is asked whether it has had enough, so this and its
high-water mark bound what it holds."""


class DirectOutbox(Outbox):
    """Writes prepared frames to the transport of a `DirectTransport`.

    Args:
        link: Where to write.
        min_bytes: Messages below this size are not compressed.
    """

    __slots__ = ("_direct", "_min_bytes", "_paused", "_window_bits", "_write")

    def __init__(
        self,
        owner: OutboxOwner,
        limits: OutboxLimits,
        scheduler: FlushScheduler,
        shard: int,
        *,
        direct: DirectTransport,
        min_bytes: int,
    ) -> None:
        super().__init__(owner, limits, scheduler, shard)
        self._direct = direct
        self._min_bytes = min_bytes
        # Copies of what the link knows. Of a broadcast to many, waiting for the memory of each connection's objects is
        # most of the cost, so this touches as few of them as it can.
        self._paused = False
        self._window_bits = 0
        self._write: Callable[[bytes], None] = direct.transport.write

    def on_attached(self, *, compress: bool) -> None:
        """The link is ours now, and has negotiated what it has."""
        if self._direct.write_paused:
            self.pause_writing()
        self._window_bits = self._direct.window_bits if compress else 0

    def flush_now(self) -> None:
        """As every outbox. Hot path: nearly always one frame waits, and nothing is unusual."""
        frame = self._single
        if (
            frame is None
            or self._shut
            or self._broken
            or self._deflates
            or self._paused
            or self._slow
            or self._control
            or self._waiters
        ):
            super().flush_now()
            return
        self._due = False
        self._single = self._keyed = None
        self.held_bytes = 0
        try:
            self._write(frame.compressed(self._window_bits, self._min_bytes) if self._window_bits else frame.framed())
        except Exception as error:  # whatever the transport raises, it takes nothing any more
            self._failed(error, 1)
        else:
            limits = self._limits
            limits.counters.messages_sent += 1
            if limits.reports_delivery:
                self.owner.on_delivered()

    def _send_queued(self) -> None:
        """What is queued becomes one write, as far as the transport takes it."""
        while self._any:
            if self._paused:
                self._block()
                return
            delivers = not self._control
            frames = self._take(MAX_WRITE_BYTES)
            try:
                if self._deflates:
                    frames = [to_deflated(frame) for frame in frames]
                if self._window_bits:
                    parts = [frame.compressed(self._window_bits, self._min_bytes) for frame in frames]
                else:
                    parts = [frame.framed() for frame in frames]
                self._write(parts[0] if len(parts) == 1 else b"".join(parts))
            except Exception as error:
                self._failed(error, len(frames))
                return
            self._limits.counters.messages_sent += len(frames)
            if delivers and self._limits.reports_delivery:
                self.owner.on_delivered()
        if not self._paused:
            self._on_drained()
        if self._close is not None:  # a few bytes, which a transport takes even when it has had enough
            close, self._close = self._close, None
            try:
                self._direct.close(*close)
            except Exception as error:
                self._failed(error, 0)
        if self._shut:
            self._set_done()

    def finish(self, code: int, reason: str, *, flush: bool) -> int:
        """As every outbox; what need not wait for the client is done at once."""
        discarded = super().finish(code, reason, flush=flush)
        if not flush and not self._broken:
            self._send_queued()
        return discarded

    def pause_writing(self) -> None:
        """The transport holds more than it should.

        The watch begins, even if nothing waits: a client that has stopped reading in the middle of its only message
        would be found by nothing else, since no ping can be written behind it.
        """
        self._paused = True
        if not self._shut:
            self._block()

    def resume_writing(self) -> None:
        """The transport takes more again."""
        self._paused = False
        self._unblock()
        if not self._broken:
            self._send_queued()
