"""Outbox of a connection with a direct transport: one write for each event loop iteration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from fastapi_ws_stabilizer.connection.outbox import Outbox
from fastapi_ws_stabilizer.connection.read_window import ReadWindow
from fastapi_ws_stabilizer.connection.send_queue import OutboxLimits
from fastapi_ws_stabilizer.scheduling import FlushScheduler
from fastapi_ws_stabilizer.servers.direct import DirectTransport
from fastapi_ws_stabilizer.wire.encoded import EncodedMessage
from fastapi_ws_stabilizer.wire.envelope import to_deflated

if TYPE_CHECKING:
    from fastapi_ws_stabilizer.connection.connection import Connection

MAX_WRITE_BYTES: Final = 256 * 1024
"""Size in bytes at which the outbox stops joining frames into one write. The outbox checks for backpressure after each
write, so this and the transport's high-water mark bound the transport's buffer."""


class DirectOutbox(Outbox):
    """Outbox that writes encoded frames to the transport of a `DirectTransport`.

    Args:
        direct: The direct transport.
        min_bytes: Minimum size in bytes of a compressed message.
    """

    __slots__ = (
        "_bounds_unread",
        "_compresses",
        "_min_bytes",
        "_paused",
        "_read_window",
        "_window_bits",
        "_write",
        "direct",
    )

    def __init__(
        self,
        connection: Connection,
        limits: OutboxLimits,
        scheduler: FlushScheduler,
        shard: int,
        *,
        direct: DirectTransport,
        min_bytes: int,
    ) -> None:
        super().__init__(connection, limits, scheduler, shard)
        self.direct = direct
        self._min_bytes = min_bytes
        # Copies of state of the direct transport. In a large broadcast, cache misses on each connection's objects are
        # most of the cost, so this code touches as few objects as possible.
        self._paused = False
        self._window_bits = 0
        self._compresses = False
        self._bounds_unread = False
        self._read_window: ReadWindow | None = None  # created for the first message with a `coalesce_key`
        self._write: Callable[[bytes], None] = direct.transport.write

    def on_attached(self, *, compress: bool, bounds_unread: bool) -> None:
        """Read the negotiated state of the direct transport once it is attached.

        Args:
            compress: Whether messages are compressed, if the client supports it.
            bounds_unread: Whether the client answers pings, so that the messages with a `coalesce_key` that it has not
                read can be bounded.
        """
        if self.direct.write_paused:
            self.pause_writing()
        self._bounds_unread = bounds_unread
        self._window_bits = self.direct.window_bits if compress else 0
        self._compresses = self._window_bits > 0 or self._deflates

    def deflate_frames(self) -> None:
        """Send compressed v1 frames from now on, where compression saves enough."""
        super().deflate_frames()
        self._compresses = True

    def on_flush_due(self) -> None:
        """Send what can be sent now. Hot path: nearly always exactly one frame is queued."""
        frame = self._single
        if frame is None or not self.fast or (frame.key is not None and self._bounds_unread):
            super().on_flush_due()
            return
        self._due = False
        self._single = None
        try:
            self._write(self._compressed(frame) if self._compresses else frame.framed())
        except Exception as error:  # after any error the transport accepts no more writes
            self._failed(error, 1)
        else:
            limits = self.limits
            limits.counters.messages_sent += 1
            if limits.reports_delivery:
                self.connection.on_delivered()

    def _compressed(self, frame: EncodedMessage) -> bytes:
        """Return a frame as it is sent on the wire, compressed as the client accepts it."""
        if self._deflates:
            frame = to_deflated(frame)
        return frame.compressed(self._window_bits, self._min_bytes) if self._window_bits else frame.framed()

    def _send_queued(self) -> None:
        """Write the queued frames in batches until the transport pauses writing."""
        while self._any:
            if self._paused:
                self.block()
                return
            delivers = not self._control
            frames = self._take(MAX_WRITE_BYTES) if delivers else self._take_control()
            if not frames:  # the first one waits for a pong
                self.block()
                return
            try:
                parts = [self._compressed(frame) if self._compresses else frame.framed() for frame in frames]
                self._write(parts[0] if len(parts) == 1 else b"".join(parts))
                if self._read_window is not None:
                    self._read_window.sent(sum(frame.size for frame in frames if frame.key is not None))
            except Exception as error:
                self._failed(error, len(frames))
                return
            self.limits.counters.messages_sent += len(frames)
            if delivers and self.limits.reports_delivery:
                self.connection.on_delivered()
        if not self._paused:
            self._on_drained()
        if self._close is not None:  # a few bytes, which a transport accepts even while writing is paused
            close, self._close = self._close, None
            try:
                self.direct.close(*close)
            except Exception as error:
                self._failed(error, 0)
        if self._shut:
            self._set_done()

    def _take(self, max_bytes: int) -> Sequence[EncodedMessage]:
        """Dequeue messages until `max_bytes` are reached, or until one with a key has to wait for a pong."""
        if not self._bounds_unread or self._shut or not self._has_keys or self.connection.pause is not None:
            return super()._take(max_bytes)
        if self._read_window is None:
            self._read_window = ReadWindow(self.direct)
        frames = self._open_queue().pop_within(max_bytes, self._read_window.room)
        if self._waiters:
            self._serve_waiters()
        return frames

    @property
    def _has_keys(self) -> bool:
        """Whether a message with a key may be queued."""
        if self._queue is not None:
            return self._queue.has_keys
        return self._single is not None and self._single.key is not None

    @property
    def waits_for_pong(self) -> bool:
        """Whether sends are blocked until the client has read more."""
        return self.blocked and not self._paused and not self._broken

    def pong_received(self, payload: bytes) -> bool:
        """Process a pong. Return `False` if it answers no ping of this outbox."""
        if self._read_window is None or not self._read_window.confirm(payload):
            return False
        self._send_waiting()
        return True

    def heartbeat_answered(self, asked_at: float) -> None:
        """Process the pong to a heartbeat that was sent at this time. The client has read what was sent before."""
        if self._read_window is not None and self._read_window.confirm_until(asked_at):
            self._send_waiting()

    def on_reading_paused(self) -> None:
        """Wait for no pong until reading continues, because a full inbox keeps the server from reading it.

        Otherwise an endpoint that waits for room in the outbox would never read the messages before the pong.
        """
        self._send_waiting()

    def _send_waiting(self) -> None:
        """Send what has waited for a pong."""
        if self.waits_for_pong:
            self.unblock()
            self._send_queued()

    def finish(self, code: int, reason: str, *, flush: bool) -> int:
        """Accept no more messages and send the close frame, at once unless queued messages are flushed first."""
        if self.waits_for_pong:
            self.unblock()
        discarded = super().finish(code, reason, flush=flush)
        if not flush and not self._broken:
            self._send_queued()
        return discarded

    def pause_writing(self) -> None:
        """Stop writing because the transport's buffer is above its high-water mark.

        The stall watch starts even if nothing is queued. Nothing else detects a client that stops reading in the
        middle of its only message, because no ping can be written behind that message.
        """
        if self.waits_for_pong:  # the time of that wait does not count
            self.unblock()
        self._paused = True
        if not self._shut:
            self.block()

    def resume_writing(self) -> None:
        """Resume writing."""
        self._paused = False
        self.unblock()
        if not self._broken:
            self._send_queued()
