"""One connection attempt, and the connection that results, until it is lost."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Final

from pydantic_core import to_json

from fastapi_ws_stabilizer.client.errors import (
    ClientClosedError,
    MessageTooLargeError,
    RefusedError,
    UnreadableFrameError,
)
from fastapi_ws_stabilizer.client.events import logger
from fastapi_ws_stabilizer.client.owner import ConnectionLost, Gap, Owner
from fastapi_ws_stabilizer.client.send_buffer import validate_frame
from fastapi_ws_stabilizer.client.timers import NamedTimers
from fastapi_ws_stabilizer.client.transport import Connect, Transport, TransportClosedError, UnreadableMessageError
from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.tasks import TaskSet, wait_for_all, wait_for_first
from fastapi_ws_stabilizer.wire.strict_json import MAX_FRAME_DEPTH
from fastapi_ws_stabilizer.wire.v1.frames import (
    DEFLATE_CAP,
    MAX_SENT_BYTES,
    RETRY_CAP,
    SUBPROTOCOL,
    VERSION,
    DelayedAcks,
    ProtocolError,
    deflated,
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

READ_ERROR_GRACE: Final = 0.5
"""Seconds between a failed write and the end of the connection."""

_CLIENT_CODES: Final = frozenset({1000, 4000, 4400, 4408, 4412})
"""Close codes that a client sends."""

MAX_RETRY_DELAY: Final = 300.0
"""Maximum time that a server can pause the client's messages, in seconds."""

MAX_PENDING_CONTROL: Final = 64
"""Maximum number of queued control frames."""


class ClientConnection:
    """One connection. It is never reopened, and it ignores frames that arrive after it was lost.

    Args:
        client: The client that it belongs to.
        tasks: The task set for its tasks.
        connect_timeout: Seconds from the URL to the welcome.
        stable_after: Seconds after which it is stable.

    Attributes:
        rtt: Last measured round trip in seconds.
    """

    def __init__(self, client: Owner, tasks: TaskSet, connect_timeout: float, stable_after: float) -> None:
        self._client = client
        self._tasks = tasks
        self._connect_timeout = connect_timeout
        self._stable_after = stable_after
        self._loop = asyncio.get_running_loop()
        self._lost: asyncio.Future[ConnectionLost] = self._loop.create_future()
        self._transport: Transport | None = None
        self._open = False
        self._control: list[str | bytes] = []
        self._wakeup: asyncio.Future[None] | None = None
        self._idle: asyncio.Future[None] | None = None
        self._timers = NamedTimers()
        self._acks = DelayedAcks(ACK_WITHIN)
        self._received_at = monotonic()
        self._reading_paused = False  # whether the client has stopped reading
        self._whole_bytes = 0  # bytes received when the last complete frame was read
        self._progress: int | None = None  # send progress at the last probe
        self._probed_at = 0.0
        self._silence_timeout = 0.0
        self._keepalive_interval = 0.0  # seconds between acknowledgements during a large message
        self._deflates = False  # whether the server accepts compressed frames
        self._pinged_at = 0.0
        self._retry_logged = False  # whether the server has asked for a message again
        self._drain_at: float | None = None
        self.rtt: float | None = None

    async def run(self, dial: Connect) -> ConnectionLost:
        """Connect, wait for the welcome, read and write; return how the connection was lost."""
        self._timers.start("connect", self._connect_timeout, lambda: self.mark_lost(4408, "connect timeout"))
        tasks = [self._tasks.spawn(self._read(dial), name="ws-client-reader")]
        try:
            await wait_for_all([self._lost], None)
            return self._lost.result()
        finally:
            self._timers.stop_all()
            self._acks.reset()
            self.mark_lost(1006, "cancelled")
            for task in tasks:
                task.cancel()
            if self._transport is not None:
                lost = self._lost.result()
                code = lost.code if lost.code in _CLIENT_CODES else 4000
                closing = self._tasks.spawn(self._close(self._transport, code, lost.reason), name="ws-client-close")
                if code == 1000:  # only the end of the session waits for the close frame
                    await wait_for_all([closing], CLOSE_TIMEOUT + 1.0)

    def mark_lost(self, code: int, reason: str, *, at_once: bool = False) -> None:
        """End the connection. The first call decides, and the client does not wait for a close frame."""
        if not self._lost.done():
            self._report_truncated(code)
            self._lost.set_result(ConnectionLost(code, reason, self._open, at_once))
            self._open = False

    def _report_truncated(self, code: int) -> None:
        """Report to the client that the connection ends during a large message."""
        unfinished = self._received()[0] - self._whole_bytes
        if self._open and not self._reading_paused and code != 1000 and unfinished >= MIN_TRUNCATED_BYTES:
            self._client.mark_truncated()

    def _received(self) -> tuple[int, float]:
        ask = getattr(self._transport, "received", None)
        return (0, 0.0) if ask is None else ask()

    def _send_progress(self) -> int | None:
        ask = getattr(self._transport, "send_progress", None)
        return None if ask is None else ask()

    async def _close(self, transport: Transport, code: int, reason: str) -> None:
        closing = self._tasks.spawn(transport.close(code, reason[:40]), name="ws-client-close-frame")
        await wait_for_all([closing], CLOSE_TIMEOUT)
        closing.cancel()

    # ── reading ──

    async def _read(self, dial: Connect) -> None:
        try:
            transport = await self._open_transport(dial)
            self._tasks.spawn(self._write(transport), name="ws-client-writer")
            while not self._lost.done():
                frame = await transport.receive()
                if self._lost.done():
                    return
                self._mark_received()
                self._receive(frame)
                self._reading_paused = True
                await self._client.incoming.room()
                self._reading_paused = False
                if "probe" in self._timers:  # the answer may have arrived while the client did not read
                    self._await_answer()
        except TransportClosedError as lost:
            if isinstance(lost, UnreadableMessageError):
                self._skip_frame(lost.reason)
            self.mark_lost(lost.code, lost.reason)
        except ClientClosedError as final:
            self.mark_lost(final.code, final.reason)
        except Exception as error:  # your functions for the URL and the credential may raise anything
            self._client.emit("error", error)
            self.mark_lost(1006, repr(error))

    async def _open_transport(self, dial: Connect) -> Transport:
        client = self._client
        credential = await client.credential(force=client.is_credential_rejected)
        transport = self._transport = await dial(await client.address(), [SUBPROTOCOL])
        if transport.subprotocol != SUBPROTOCOL:
            raise ClientClosedError(4406, f"the server does not support {SUBPROTOCOL}")
        client.attempts += 1
        hello: dict[str, Any] = {"type": "hello", "v": VERSION, "n": client.attempts, "client": client.instance_id}
        hello["caps"] = [RETRY_CAP]
        if client.deflate and not transport.compresses:
            hello["caps"].append(DEFLATE_CAP)
        if credential is not None:
            hello["auth"] = credential
        if client.token is not None:
            hello["resume"] = {"token": client.token, "seq": client.last_seq}
        await transport.send(to_json(hello).decode())
        return transport

    def _mark_received(self) -> None:
        self._received_at = monotonic()
        self._whole_bytes = self._received()[0]
        self._timers.stop("probe")

    def _receive(self, raw: str | bytes) -> None:
        try:
            frame = parse(raw, MAX_SENT_BYTES if self._client.deflate else 0, MAX_FRAME_DEPTH)
        except ProtocolError as bad:
            if self._open and is_numbered(raw):  # otherwise the counts differ, and the next ping ends the connection
                self._count()
            self._skip_frame(str(bad))
            return
        try:
            self._dispatch(frame)
        except ProtocolError as bad:
            self._skip_frame(str(bad))
            if not self._open and not self._lost.done():
                self.mark_lost(4412, "unreadable welcome")

    def _skip_frame(self, why: str) -> None:
        """Skip a frame that cannot be read.

        The connection stays open, because the data may come from another client.
        """
        self._client.report_unreadable(UnreadableFrameError(why))

    def _count(self) -> None:
        self._client.last_seq += 1  # before the handler runs: a handler that fails does not get the message again
        self._acks.schedule(self._send_ack)

    def _dispatch(self, frame: dict[str, Any]) -> None:
        kind = frame["type"]
        if not self._open:
            if kind == "welcome":
                self._receive_welcome(frame)
            return
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
                self._tasks.spawn(self._refresh(), name="ws-client-auth")
        elif kind == "error":
            self._receive_error(frame)

    def _receive_error(self, frame: dict[str, Any]) -> None:
        """Handle a message that the server has rejected, permanently or for some time."""
        buffer, seq, retry = self._client.buffer, optional_int(frame, "seq"), optional_int(frame, "retry")
        error = RefusedError(str(frame.get("code", "error"))[:64], str(frame.get("message", ""))[:1024], seq)
        if seq is not None and retry is not None:
            if buffer.retry_from(seq):
                level = logging.DEBUG if self._retry_logged else logging.INFO
                logger.log(level, "the server asks the client to retry later: %s", error)
                self._retry_logged = True
                self._timers.start("retry", min(retry / 1000, MAX_RETRY_DELAY), self.wake)
            return
        if seq is not None:
            error.event = buffer.on_rejected(seq, error)
        self._client.refused(error)

    def _receive_message(self, kind: str, frame: dict[str, Any]) -> None:
        client = self._client
        client.clear_truncated()
        if frame.get("volatile") is not True:
            self._count()
        if kind == "reply":
            client.answered(optional_text(frame, "re") or "", frame.get("data"), frame.get("error"))
        else:
            client.incoming.put(message_of(frame))

    def _receive_ping(self, frame: dict[str, Any]) -> None:
        sent = optional_int(frame, "seq")
        if sent is not None and sent != self._client.last_seq:
            self.mark_lost(4412, "sequence gap")
            return
        if sent is not None:  # the ping is ordered with the messages
            self._client.clear_truncated()
        self._acks.reset()
        fields: dict[str, Any] = {"type": "pong", "ack": self._client.last_seq}
        if "ts" in frame:
            fields["ts"] = frame["ts"]
        self.put(to_json(fields).decode())

    async def _refresh(self) -> None:
        try:
            token = await self._client.credential(force=True)
        except Exception as error:
            self._client.emit("error", error)
            return
        if token is not None and self._open:
            self.put(to_json({"type": "auth", "token": token}).decode())

    def _drain(self, frame: dict[str, Any]) -> None:
        after, within = require_int(frame, "after") / 1000, (optional_int(frame, "within") or 0) / 1000
        self._client.emit("drain", after, within)
        due = monotonic() + after
        if self._drain_at is None or due < self._drain_at:
            self._drain_at = due
            self._timers.start("drain", after, lambda: self.mark_lost(4000, "drain", at_once=True))

    # ── the welcome ──

    def _receive_welcome(self, frame: dict[str, Any]) -> None:
        client = self._client
        outcome = frame.get("resume")
        token, session = optional_text(frame, "token", 512), optional_text(frame, "session")
        seq, accepted = require_int(frame, "seq"), require_int(frame, "ack")
        if token is None or session is None or outcome not in ("none", "full", "gap", "lost"):
            raise ProtocolError("welcome: token, session or resume is missing or invalid")
        before = client.last_seq
        if outcome == "full" and seq != before:
            self.mark_lost(4412, "sequence number mismatch")
            return
        if outcome == "none" and client.session is not None:  # the client has abandoned the old session
            outcome, frame = "lost", {**frame, "why": "given_up"}
        client.session, client.token, client.last_seq = session, token, seq
        caps = frame.get("caps")
        self._deflates = client.deflate and isinstance(caps, list) and DEFLATE_CAP in caps
        client.buffer.max_frame = optional_int(frame, "max", least=1) or client.buffer.max_frame
        ping, timeout = require_int(frame, "ping") / 1000, require_int(frame, "timeout") / 1000
        self._silence_timeout = ping + timeout if ping else 0.0
        self._keepalive_interval = min(ping, timeout) / 2
        if outcome in ("none", "lost"):
            client.restart_session(accepted)
        else:
            client.buffer.resume(accepted)
        self._open = True
        self._timers.stop("connect")
        self._timers.start("stable", self._stable_after, client.stable)
        self._timers.start("replay", REPLAY_TIMEOUT, self._track_replay)
        self._send_ack()
        if outcome in ("gap", "lost"):
            lost = outcome == "lost"
            why = optional_text(frame, "why")
            client.emit("gap", Gap(lost, why, before + 1, None if lost else seq))
        client.opened(outcome)
        self._watch()
        self.wake()

    def _track_replay(self) -> None:
        """Forget the truncated message if the server replays nothing.

        Replayed messages arrive together with the welcome.
        """
        if not self._reading_paused and self._received()[0] == self._whole_bytes:
            self._client.clear_truncated()

    # ── acknowledging ──

    def _send_ack(self) -> None:
        self._acks.reset()
        self.put(to_json({"type": "ack", "seq": self._client.last_seq}).decode())

    # ── writing ──

    def put(self, frame: str | bytes) -> None:
        """Queue an unbuffered frame ahead of the messages. If too many wait, the oldest is dropped."""
        self._control.append(frame)
        if len(self._control) > MAX_PENDING_CONTROL:
            del self._control[0]
        self.wake()

    def send_volatile(self, data: Any, event: str | None) -> bool:
        """Send an unnumbered message; return `False` if the connection cannot take it now."""
        if not self._open or len(self._control) >= MAX_PENDING_CONTROL:
            return False
        frame = validate_frame(envelope("msg", data, event=event), {"event": event})
        size = len(frame if isinstance(frame, bytes) else frame.encode("utf-8"))
        max_bytes = self._client.buffer.max_frame
        if size > max_bytes:
            raise MessageTooLargeError(size, max_bytes)
        self.put(frame)
        return True

    def wake(self) -> None:
        """Wake the writer, because there may be something to send."""
        if self._wakeup is not None and not self._wakeup.done():
            self._wakeup.set_result(None)

    async def flushed(self, timeout: float) -> None:
        """Wait until all sendable frames are written, at most `timeout` seconds."""
        if self._open and (self._wakeup is None or self._wakeup.done()):
            self._idle = self._loop.create_future()
            await wait_for_first([self._idle, self._lost], timeout)

    async def _write(self, transport: Transport) -> None:
        try:
            while not self._lost.done():
                frame = self._next_frame()
                if frame is None:
                    if self._idle is not None and not self._idle.done():
                        self._idle.set_result(None)
                    self._wakeup = self._loop.create_future()
                    await wait_for_first([self._wakeup, self._lost])
                    continue
                await transport.send(frame)
        except TransportClosedError as lost:
            # The reader may know the cause, and still has data that arrived before.
            code, reason = lost.code, lost.reason
            self._timers.start("write", READ_ERROR_GRACE, lambda: self.mark_lost(code, reason))
        except Exception as error:
            # Without a writer the connection looks open but is dead, and nothing else detects that.
            logger.exception("the client's writer failed")
            self.mark_lost(1006, repr(error))

    def _next_frame(self) -> str | bytes | None:
        if self._control:
            return self._control.pop(0)
        if not self._open or "retry" in self._timers:
            return None
        message = self._client.buffer.pop_next()
        if message is None:
            return None
        self._check_unacked()
        frame = message.frame()
        if self._deflates and isinstance(frame, str):
            return deflated(frame) or frame
        return frame

    # ── liveness ──

    def _watch(self) -> None:
        """Close the connection if the server has been silent for too long."""
        if not self._silence_timeout:
            return
        now = monotonic()
        if self._reading_paused:
            self._received_at = now
        heard = max(self._received_at, self._received()[1])
        silent = now - heard
        if silent >= self._silence_timeout:
            self.mark_lost(4408, "heartbeat timeout")
            return
        if silent < self._keepalive_interval <= now - self._received_at:
            # A large message is arriving, and the server's ping comes after it. This frame shows that the client lives.
            self._send_ack()
        self._timers.start(
            "watch", max(0.05, min(self._keepalive_interval, self._silence_timeout - silent)), self._watch
        )

    def probe(self) -> None:
        """Send a ping, and close the connection if the server does not answer in time."""
        if self._open and "probe" not in self._timers:
            self._pinged_at = monotonic()
            self.put('{"type":"ping"}')
            self._await_answer()

    def _await_answer(self) -> None:
        """Start the timer of a probe, extended by the time for the data that is sent before it."""
        oldest = self._client.buffer.oldest_sent
        self._probed_at, self._progress = monotonic(), self._send_progress()
        in_flight = 0.0 if oldest is None else oldest.size / SLOWEST_UPLINK
        self._timers.start("probe", self._client.probe_timeout + in_flight, self._on_probe_timeout)

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
        buffer = self._client.buffer
        oldest = buffer.oldest_sent
        buffer.acknowledge(seq)
        self.wake()  # the send window may have grown
        if buffer.oldest_sent is not oldest:
            self._timers.stop("accept")
            self._check_unacked()

    def _check_unacked(self) -> None:
        """Probe the connection if the oldest sent message is not acknowledged within its deadline."""
        oldest = self._client.buffer.oldest_sent
        if oldest is None or "accept" in self._timers:
            return
        left = oldest.sent_at + ACK_TIMEOUT - monotonic()
        if left <= 0:
            self.probe()
            left = ACK_TIMEOUT
        self._timers.start("accept", left, self._check_unacked)
