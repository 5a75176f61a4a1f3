"""One connection attempt, and the connection that results, until it is lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

from pydantic_core import to_json

from fastapi_ws_stabilizer.client.errors import ClientClosedError, HttpRejection, MessageTooLargeError, RefusedError
from fastapi_ws_stabilizer.client.events import logger
from fastapi_ws_stabilizer.client.send_buffer import validate_frame
from fastapi_ws_stabilizer.client.session import ClientSession, Welcome
from fastapi_ws_stabilizer.client.target import Target
from fastapi_ws_stabilizer.client.timers import NamedTimers
from fastapi_ws_stabilizer.client.transport import Transport, TransportClosedError, UnreadableMessageError
from fastapi_ws_stabilizer.client.writer import FrameWriter
from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.tasks import TaskSet, wait_for_all, wait_for_first
from fastapi_ws_stabilizer.wire.strict_json import MAX_FRAME_DEPTH
from fastapi_ws_stabilizer.wire.v1.frames import (
    MAX_SENT_BYTES,
    SUBPROTOCOL,
    DelayedAcks,
    ProtocolError,
    envelope,
    is_numbered,
    message_of,
    optional_int,
    optional_text,
    parse,
    require_int,
)

ACK_WITHIN: Final = 1.0
"""Maximum delay of an acknowledgement, in seconds."""

ACK_TIMEOUT: Final = 10.0
"""Seconds without the server's acknowledgement after which the client probes the connection."""

SLOWEST_UPLINK: Final = 16 * 1024
"""Minimum send rate in bytes per second. A slower connection may count as dead while it carries a large message."""

MIN_TRUNCATED_BYTES: Final = 16 * 1024
"""Minimum size in bytes of an incomplete message that counts as truncated. A smaller one is not the cause of a lost
connection."""

REPLAY_TIMEOUT: Final = 1.0
"""Seconds after the welcome within which the first replayed bytes arrive."""

CLOSE_TIMEOUT: Final = 5.0
"""Maximum seconds to send a close frame on an abandoned connection."""

CANCELLED_CLOSE_TIMEOUT: Final = 1.0
"""The same if the client was cancelled, because the end of the event loop waits for it."""

READ_ERROR_GRACE: Final = 0.5
"""Seconds between a failed write and the end of the connection."""

_CLIENT_CODES: Final = frozenset({1000, 4000, 4400, 4408, 4412})
"""Close codes that a client sends."""

MAX_RETRY_DELAY: Final = 300.0
"""Maximum time that a server can pause the client's messages, in seconds."""


@dataclass(frozen=True)
class ConnectionLost:
    """How a connection, or an attempt to open one, has ended.

    Attributes:
        code: Close code; 1006 without one.
        reason: Close reason.
        was_open: Whether the server had sent its welcome.
        was_stable: Whether it was open for `stable_after` seconds.
        at_once: Whether the client left the connection to reconnect immediately.
        rejection: HTTP response of the server that rejected the handshake.
    """

    code: int
    reason: str
    was_open: bool = False
    was_stable: bool = False
    at_once: bool = False
    rejection: HttpRejection | None = None


@dataclass(frozen=True)
class ConnectionOptions:
    """Options of a client that apply to each of its connections.

    Attributes:
        connect_timeout: Seconds from the URL to the server's welcome.
        stable_after: Seconds after which an open connection is stable.
        probe_timeout: Seconds that the server has to answer a probe.
        deflate: Whether frames are compressed if the server does not offer permessage-deflate.
    """

    connect_timeout: float
    stable_after: float
    probe_timeout: float
    deflate: bool


class ClientConnection:
    """One connection. It is never reopened, and it ignores frames that arrive after it was lost.

    Call `open`, then `serve` if the server has sent its welcome, and `close` in any case.

    Args:
        session: The session that it belongs to.
        target: The server.
        tasks: The task set for its tasks.
        options: Options of the client.

    Attributes:
        rtt: Last measured round trip in seconds.
    """

    def __init__(self, session: ClientSession, target: Target, tasks: TaskSet, options: ConnectionOptions) -> None:
        self._session = session
        self._target = target
        self._tasks = tasks
        self._options = options
        self._lost: asyncio.Future[ConnectionLost] = asyncio.get_running_loop().create_future()
        self._reader: asyncio.Task[None] | None = None  # opens the connection, then reads
        self._transport: Transport | None = None
        self._writer = FrameWriter(session.buffer)
        self._timers = NamedTimers()
        self._acks = DelayedAcks(ACK_WITHIN)
        self._welcome: Welcome | None = None
        self._opened_at = 0.0
        self._received_at = monotonic()
        self._reading_paused = False  # whether the client has stopped reading
        self._whole_bytes = 0  # bytes received when the last complete frame was read
        self._progress: int | None = None  # send progress at the last probe
        self._probed_at = 0.0
        self._silence_timeout = 0.0
        self._keepalive_interval = 0.0  # seconds between acknowledgements during a large message
        self._pinged_at = 0.0
        self._retry_logged = False  # whether the server has asked for a message again
        self._drain_at: float | None = None
        self.rtt: float | None = None

    # ── lifecycle ──

    async def open(self, *, renews_credential: bool) -> Welcome | None:
        """Connect, and return the server's welcome; `None` if the attempt has failed.

        Args:
            renews_credential: Whether the server has rejected the last credential.
        """
        self._timers.start("connect", self._options.connect_timeout, lambda: self.mark_lost(4408, "connect timeout"))
        self._reader = self._tasks.spawn(self._until_lost(self._connect, renews_credential), name="ws-client-connect")
        await wait_for_first([self._reader, self._lost])
        return None if self._lost.done() else self._welcome

    async def serve(self) -> None:
        """Read and write until the connection is lost. The session must be attached."""
        transport = self._transport
        if transport is None or self._lost.done():
            return
        self._timers.start("replay", REPLAY_TIMEOUT, self._track_replay)
        self._send_ack()
        self._check_silence()
        self._check_unacked()
        self._tasks.spawn(self._write(transport), name="ws-client-writer")
        self._reader = self._tasks.spawn(self._until_lost(self._read, transport), name="ws-client-reader")
        await wait_for_all([self._lost], None)

    def mark_lost(
        self, code: int, reason: str, *, at_once: bool = False, rejection: HttpRejection | None = None
    ) -> None:
        """End the connection. The first call decides, and the client does not wait for a close frame."""
        if self._lost.done():
            return
        self._report_truncated(code)
        is_stable = self.is_open and monotonic() - self._opened_at >= self._options.stable_after
        self._lost.set_result(ConnectionLost(code, reason, self.is_open, is_stable, at_once, rejection))
        self._writer.stop()

    async def close(self) -> ConnectionLost:
        """Stop all work, close the WebSocket, and return how the connection was lost.

        Only the end of the session and a cancelled client wait for the close frame. An event loop that ends cancels the
        tasks that it knows, so no task may be left for later. Cancelling stops the wait.
        """
        is_cancelled = not self._lost.done()
        self.mark_lost(1006, "cancelled")
        lost = self._lost.result()
        self._timers.stop_all()
        self._acks.reset()
        if self._reader is not None:
            self._reader.cancel()
        if self._transport is not None:
            code = lost.code if lost.code in _CLIENT_CODES else 4000
            timeout = CANCELLED_CLOSE_TIMEOUT if is_cancelled else CLOSE_TIMEOUT
            closing = self._tasks.spawn(
                self._close(self._transport, code, lost.reason, timeout), name="ws-client-close"
            )
            if code == 1000 or is_cancelled:
                await wait_for_all([closing], timeout + 1.0)
        return lost

    async def _close(self, transport: Transport, code: int, reason: str, timeout: float) -> None:
        closing = self._tasks.spawn(transport.close(code, reason[:40]), name="ws-client-close-frame")
        if not await wait_for_all([closing], timeout):
            closing.cancel()
            await wait_for_all([closing], 1.0)  # the transport aborts the connection

    @property
    def is_open(self) -> bool:
        """Whether the server has sent its welcome and the connection is not lost."""
        return self._welcome is not None and not self._lost.done()

    async def _until_lost(self, work: Callable[..., Awaitable[None]], *args: Any) -> None:
        """Open the connection or read from it, and mark it as lost if that fails."""
        try:
            await work(*args)
        except TransportClosedError as lost:
            if isinstance(lost, UnreadableMessageError):
                self._session.on_unreadable(lost.why)
            self.mark_lost(lost.code, lost.reason, rejection=lost.rejection)
        except ClientClosedError as final:
            self.mark_lost(final.code, final.reason)
        except Exception as error:  # your functions for the URL and the credential may raise anything
            self._session.events.emit("error", error)
            self.mark_lost(1006, repr(error))

    def _report_truncated(self, code: int) -> None:
        """Report to the session that the connection ends during a large message."""
        unfinished = self._received()[0] - self._whole_bytes
        if self.is_open and not self._reading_paused and code != 1000 and unfinished >= MIN_TRUNCATED_BYTES:
            self._session.mark_truncated()

    def _received(self) -> tuple[int, float]:
        ask = getattr(self._transport, "received", None)
        return (0, 0.0) if ask is None else ask()

    def _send_progress(self) -> int | None:
        ask = getattr(self._transport, "send_progress", None)
        return None if ask is None else ask()

    # ── opening ──

    async def _connect(self, renews_credential: bool) -> None:
        credential = await self._target.credential(force=renews_credential)
        transport = self._transport = await self._target.dial()
        if transport.subprotocol != SUBPROTOCOL:
            raise ClientClosedError(4406, f"the server does not support {SUBPROTOCOL}")
        offers_deflate = self._options.deflate and not transport.compresses
        await transport.send(self._session.hello(credential, deflates=offers_deflate))
        while self._welcome is None and not self._lost.done():
            frame = self._parse(await transport.receive())
            if frame is not None and frame["type"] == "welcome" and not self._lost.done():
                self._receive_welcome(frame)

    def _receive_welcome(self, frame: dict[str, Any]) -> None:
        try:
            welcome = Welcome.from_frame(frame)
        except ProtocolError as bad:
            self._session.on_unreadable(str(bad))
            self.mark_lost(4412, "unreadable welcome")
            return
        if welcome.outcome == "full" and welcome.seq != self._session.last_seq:
            self.mark_lost(4412, "sequence number mismatch")
            return
        ping, timeout = welcome.ping_interval, welcome.ping_timeout
        self._silence_timeout = ping + timeout if ping else 0.0
        self._keepalive_interval = min(ping, timeout) / 2
        self._writer.deflates = self._options.deflate and welcome.deflates
        self._opened_at = monotonic()
        self._timers.stop("connect")
        self._welcome = welcome

    def _track_replay(self) -> None:
        """Forget the truncated message if the server replays nothing.

        Replayed messages arrive together with the welcome.
        """
        if not self._reading_paused and self._received()[0] == self._whole_bytes:
            self._session.clear_truncated()

    # ── reading ──

    async def _read(self, transport: Transport) -> None:
        while not self._lost.done():
            raw = await transport.receive()
            if self._lost.done():
                return
            frame = self._parse(raw)
            if frame is not None:
                try:
                    self._dispatch(frame)
                except ProtocolError as bad:
                    self._session.on_unreadable(str(bad))
            self._reading_paused = True
            await self._session.inbound.room()
            self._reading_paused = False
            if "probe" in self._timers:  # the answer may have arrived while the client did not read
                self._await_answer()

    def _parse(self, raw: str | bytes) -> dict[str, Any] | None:
        """Return a received frame; `None` if it cannot be read.

        The client skips such a frame and the connection stays open, because the data may come from another client.
        """
        self._received_at = monotonic()
        self._whole_bytes = self._received()[0]
        self._timers.stop("probe")
        try:
            return parse(raw, MAX_SENT_BYTES if self._options.deflate else 0, MAX_FRAME_DEPTH)
        except ProtocolError as bad:
            if self.is_open and is_numbered(raw):  # otherwise the counts differ, and the next ping ends the connection
                self._count()
            self._session.on_unreadable(str(bad))
            return None

    def _count(self) -> None:
        self._session.last_seq += 1  # before the handler runs: a handler that fails does not get the message again
        self._acks.schedule(self._send_ack)

    def _dispatch(self, frame: dict[str, Any]) -> None:
        kind = frame["type"]
        if kind in ("msg", "reply"):
            self._receive_message(kind, frame)
        elif kind == "ack":
            self._receive_ack(require_int(frame, "seq"))
        elif kind == "ping":
            self._receive_ping(frame)
        elif kind == "pong":
            if self._pinged_at:
                self.rtt, self._pinged_at = monotonic() - self._pinged_at, 0.0
            if (accepted := optional_int(frame, "ack")) is not None:
                self._receive_ack(accepted)
        elif kind == "drain":
            self._drain(frame)
        elif kind == "auth":
            if not frame.get("ok"):
                self._tasks.spawn(self._renew_credential(), name="ws-client-auth")
        elif kind == "error":
            self._receive_error(frame)

    def _receive_message(self, kind: str, frame: dict[str, Any]) -> None:
        session = self._session
        session.clear_truncated()
        if frame.get("volatile") is not True:
            self._count()
        if kind == "reply":
            session.requests.answered(optional_text(frame, "re") or "", frame.get("data"), frame.get("error"))
        else:
            session.inbound.put(message_of(frame))

    def _receive_error(self, frame: dict[str, Any]) -> None:
        """Handle a message that the server has rejected, permanently or for some time."""
        seq, retry = optional_int(frame, "seq"), optional_int(frame, "retry")
        error = RefusedError(str(frame.get("code", "error"))[:64], str(frame.get("message", ""))[:1024], seq)
        if seq is None or retry is None:
            self._session.on_rejected(error)
        elif self._session.buffer.retry_from(seq):
            level = logging.DEBUG if self._retry_logged else logging.INFO
            logger.log(level, "the server asks the client to retry later: %s", error)
            self._retry_logged = True
            self._writer.pause_messages(min(retry / 1000, MAX_RETRY_DELAY))

    def _receive_ping(self, frame: dict[str, Any]) -> None:
        sent = optional_int(frame, "seq")
        if sent is not None and sent != self._session.last_seq:
            self.mark_lost(4412, "sequence gap")
            return
        if sent is not None:  # the ping is ordered with the messages
            self._session.clear_truncated()
        self._acks.reset()
        fields: dict[str, Any] = {"type": "pong", "ack": self._session.last_seq}
        if "ts" in frame:
            fields["ts"] = frame["ts"]
        self._writer.put(to_json(fields).decode())

    async def _renew_credential(self) -> None:
        try:
            token = await self._target.credential(force=True)
        except Exception as error:
            self._session.events.emit("error", error)
            return
        if token is not None and self.is_open:
            self._writer.put(to_json({"type": "auth", "token": token}).decode())

    def _drain(self, frame: dict[str, Any]) -> None:
        after, within = require_int(frame, "after") / 1000, (optional_int(frame, "within") or 0) / 1000
        self._session.events.emit("drain", after, within)
        due = monotonic() + after
        if self._drain_at is None or due < self._drain_at:
            self._drain_at = due
            self._timers.start("drain", after, lambda: self.mark_lost(4000, "drain", at_once=True))

    # ── writing ──

    def _send_ack(self) -> None:
        self._acks.reset()
        self._writer.put(to_json({"type": "ack", "seq": self._session.last_seq}).decode())

    def send_volatile(self, data: Any, event: str | None) -> bool:
        """Send an unnumbered message; return `False` if the connection cannot take it now."""
        if not self.is_open or self._writer.is_backpressured:
            return False
        frame = validate_frame(envelope("msg", data, event=event), {"event": event})
        size = len(frame if isinstance(frame, bytes) else frame.encode("utf-8"))
        max_bytes = self._session.buffer.max_frame
        if size > max_bytes:
            raise MessageTooLargeError(size, max_bytes)
        self._writer.put(frame)
        return True

    async def flush(self, timeout: float) -> None:
        """Wait until all frames that can be sent are written, at most `timeout` seconds. Cancelling is safe."""
        if self.is_open:
            await self._writer.flush(timeout)

    async def _write(self, transport: Transport) -> None:
        try:
            await self._writer.run(transport)
        except TransportClosedError as lost:
            # The reader may know the cause, and still has data that arrived before.
            code, reason = lost.code, lost.reason
            if not self._lost.done():
                self._timers.start("write", READ_ERROR_GRACE, lambda: self.mark_lost(code, reason))
        except Exception as error:
            # Without a writer the connection looks open but is dead, and nothing else detects that.
            logger.exception("the client's writer failed")
            self.mark_lost(1006, repr(error))

    # ── liveness ──

    def _check_silence(self) -> None:
        """Close the connection if the server has been silent for too long."""
        if not self._silence_timeout:
            return
        now = monotonic()
        if self._reading_paused:
            self._received_at = now
        silent = now - max(self._received_at, self._received()[1])
        if silent >= self._silence_timeout:
            self.mark_lost(4408, "heartbeat timeout")
            return
        if silent < self._keepalive_interval <= now - self._received_at:
            # A large message is arriving, and the server's ping comes after it. This frame shows that the client lives.
            self._send_ack()
        self._timers.start(
            "silence",
            max(0.05, min(self._keepalive_interval, self._silence_timeout - silent)),
            self._check_silence,
        )

    def probe(self) -> None:
        """Send a ping, and close the connection if the server does not answer in time."""
        if self.is_open and "probe" not in self._timers:
            self._pinged_at = monotonic()
            self._writer.put('{"type":"ping"}')
            self._await_answer()

    def _await_answer(self) -> None:
        """Start the timer of a probe, extended by the time for the data that is sent before it."""
        oldest = self._session.buffer.oldest_sent
        self._probed_at, self._progress = monotonic(), self._send_progress()
        in_flight = 0.0 if oldest is None else oldest.size / SLOWEST_UPLINK
        self._timers.start("probe", self._options.probe_timeout + in_flight, self._on_probe_timeout)

    def _on_probe_timeout(self) -> None:
        if self._reading_paused or self._has_progress():  # the server may have answered, but the client does not read
            self._await_answer()
        else:
            self.mark_lost(4408, "no answer", at_once=True)

    def _has_progress(self) -> bool:
        """Return whether bytes were sent or received since the probe, so that the answer may be delayed."""
        before, now = self._progress, self._send_progress()
        return self._received()[1] > self._probed_at or (before is not None and now is not None and now > before)

    def _receive_ack(self, seq: int) -> None:
        """Process an acknowledgement. The next unacknowledged message gets its own deadline."""
        buffer = self._session.buffer
        oldest = buffer.oldest_sent
        buffer.acknowledge(seq)
        if buffer.oldest_sent is not oldest:
            self._check_unacked()

    def _check_unacked(self) -> None:
        """Probe the connection if the oldest sent message is not acknowledged within its deadline.

        Without such a message the next look is `ACK_TIMEOUT` later, when no later message has reached its deadline.
        """
        oldest, left = self._session.buffer.oldest_sent, ACK_TIMEOUT
        if oldest is not None:
            left = oldest.sent_at + ACK_TIMEOUT - monotonic()
            if left <= 0:
                self.probe()
                left = ACK_TIMEOUT
        self._timers.start("unacked", left, self._check_unacked)
