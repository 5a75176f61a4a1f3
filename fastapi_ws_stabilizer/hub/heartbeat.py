"""One scheduler that beats for all connections.

The pulses of connections wait in a heap by the time of their next beat, and one timer of the event loop waits for the
first. An idle connection costs a place in the heap, no task and no timer of its own.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import logging
import random
from typing import Final

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.config import HeartbeatType, WebSocketConfig
from fastapi_ws_stabilizer.connection.liveness import Liveness
from fastapi_ws_stabilizer.errors import MessageEncodeError
from fastapi_ws_stabilizer.events import EventBus
from fastapi_ws_stabilizer.hub.recipient import Recipient
from fastapi_ws_stabilizer.scheduling import LoopBudget
from fastapi_ws_stabilizer.wire.encoded import EncodedMessage, encode
from fastapi_ws_stabilizer.wire.text_ping import PING

MAX_TIMER_LAG: Final = 0.5
"""Seconds by which a beat may come late before it is taken for a blocked event loop. Pongs may then wait unread in
the sockets, so nobody is closed before there was a chance to read them."""

MAX_TOGETHER: Final = 0.1
"""Seconds that a beat may wait for others, and a fiftieth of the interval at most: waking the loop costs more than a
ping."""

GRACE_AFTER_LAG: Final = 1.0
"""Seconds for that chance."""

SLOWEST_UPLOAD: Final = 4096
"""Bytes a second of the slowest client that is waited for while it sends one message. A client that sends a byte now
and then, and never completes a message, is closed when the largest message would have come at this rate."""


MUCH: Final = 16 * 1024
"""Bytes before a ping that delay it so much that they are watched: what a slow link carries in a second."""


class UnansweredPing:
    """What is remembered of a client that owes an answer, while bytes show that it lives.

    Attributes:
        since: When it was pinged.
        progress: What its machine had taken at the last look; `None` if not much was on its way before the ping.
        before_ping: What it will have taken when the ping is next.
    """

    __slots__ = ("before_ping", "progress", "since")

    def __init__(self, since: float, progress: int | None = None, unsent: int = 0) -> None:
        self.since = since
        self.progress = progress
        self.before_ping = unsent + (progress or 0)

    def has_shrunk(self, member: Recipient) -> bool:
        """Whether the client has taken bytes since the last look that stand before its ping."""
        if self.progress is None or self.progress >= self.before_ping:
            return False
        before, now = self.progress, member.send_progress()
        if now is None or now <= before:
            return False
        self.progress = now
        return True


class HeartbeatScheduler:
    """Pings each connection once per interval and ends those that fall silent.

    The first ping of a connection comes after a random part of the interval, so that clients which connected together
    are not pinged together.
    """

    def __init__(self, config: WebSocketConfig, events: EventBus) -> None:
        self._interval = config.heartbeat_interval
        self._timeout = config.heartbeat_timeout
        self._together = min(MAX_TOGETHER, config.heartbeat_interval / 50)
        self._require_pong = config.require_pong
        self._payload = config.heartbeat_payload
        self._on = config.heartbeat_type is not HeartbeatType.OFF
        self._longest_upload = config.max_message_size / SLOWEST_UPLOAD
        self._debts: dict[Liveness, UnansweredPing] = {}
        self._constant: EncodedMessage | None = None
        if config.heartbeat_type is HeartbeatType.PING:
            self._constant = PING
        elif self._on and not callable(self._payload):
            self._constant = encode(self._payload)
        self._events = events
        self._heap: list[Liveness] = []
        self._count = 0
        self._context = contextvars.copy_context()  # not that of the connection that happens to set the timer
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0.0

    def __len__(self) -> int:
        return self._count

    def add(self, member: Recipient) -> None:
        """Begin to beat for a connection."""
        if not self._on:
            return
        now = monotonic()
        member.liveness.next_ping = now + random.uniform(0.0, self._interval)  # noqa: S311 (spreads load, guards nothing)
        self._push(member, member.liveness.next_ping)
        self._arm()

    def remove(self, member: Recipient) -> None:
        """Stop beating for a connection and let go of it at once."""
        self._debts.pop(member.liveness, None)
        if member.liveness.recipient is not None:
            member.liveness.recipient = None
            self._count -= 1
            if len(self._heap) > 64 and len(self._heap) > 2 * self._count:
                self._heap = [liveness for liveness in self._heap if liveness.recipient is not None]
                heapq.heapify(self._heap)

    def stop(self) -> None:
        """Let go of all connections and of the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for liveness in self._heap:
            liveness.recipient = None
        self._heap.clear()
        self._debts.clear()
        self._count = 0

    def run_due(self, now: float, late: float = 0.0) -> None:
        """Do everything that is due at `now`.

        Args:
            now: Time on the monotonic clock.
            late: Seconds by which this comes later than it was due.
        """
        hold = LoopBudget()
        while self._heap and self._heap[0].due <= now:
            if hold.exceeded():
                break  # the timer is set anew at once: nobody is left out, and the loop gets a turn
            liveness = heapq.heappop(self._heap)
            member: Recipient | None = liveness.recipient
            if member is None:
                continue
            liveness.recipient = None
            self._count -= 1
            due = self._beat(member, now, late)
            if due is not None:
                self._push(member, due)

    def _beat(self, member: Recipient, now: float, late: float) -> float | None:
        """Beat for one connection and return when to look at it again; `None` if it is over."""
        if member.close_info is not None:
            return None
        liveness = member.liveness
        if member.reading_paused or member.has_backlog():  # what we have not read or sent is no debt of the client
            liveness.reset_deadline()
        deadline = self._deadline(member)
        if deadline is not None and now >= deadline and not self._shows_life(member, now):
            if late < MAX_TIMER_LAG:
                self._end(member, now)
                return None
            liveness.awaiting_since = now - self._timeout + min(GRACE_AFTER_LAG, self._timeout)
        if now >= liveness.next_ping:
            self._ping(member, now)
            liveness.next_ping = now + self._interval
            if member.close_info is not None:  # the payload function ended it
                return None
        deadline = self._deadline(member)
        return liveness.next_ping if deadline is None else min(liveness.next_ping, deadline)

    def _deadline(self, member: Recipient) -> float | None:
        liveness = member.liveness
        enforced = (
            liveness.has_ponged or member.pings_by_protocol if self._require_pong == "auto" else self._require_pong
        )
        if not enforced or liveness.awaiting_since is None:
            return None
        return liveness.awaiting_since + self._timeout

    def _shows_life(self, member: Recipient, now: float) -> bool:
        """Whether bytes have gone to or come from the client since it was pinged. Then its time begins anew.

        A pong waits behind a large message that the client is sending, and a ping behind one that it is reading.
        """
        liveness = member.liveness
        since = shown = liveness.awaiting_since or 0.0
        unanswered = self._debts.setdefault(liveness, UnansweredPing(since))
        silent = member.seconds_since_received()
        received = liveness.last_seen if silent is None else max(liveness.last_seen, now - silent)
        if received > since:
            liveness.last_seen = received
            shown = min(received, unanswered.since + self._longest_upload)
        if unanswered.has_shrunk(member):
            shown = now
        if shown + self._timeout <= now:
            return False
        liveness.awaiting_since = shown
        return True

    def _check_queue(self, member: Recipient, now: float) -> None:
        """A ping is about to be queued: remember what the client has taken, if much is on its way before it."""
        liveness = member.liveness
        since = liveness.awaiting_since
        unanswered = self._debts.get(liveness)
        if since is None and unanswered is not None:  # it has answered
            del self._debts[liveness]
            unanswered = None
        if unanswered is not None:
            if unanswered.has_shrunk(member):
                liveness.awaiting_since = now
            return
        unsent = member.unsent_bytes()
        if unsent is not None and unsent >= MUCH:
            self._debts[liveness] = UnansweredPing(now if since is None else since, member.send_progress(), unsent)

    def _end(self, member: Recipient, now: float) -> None:
        silent = now - member.liveness.last_seen
        self._events.emit(
            "heartbeat_timeout",
            logging.INFO,
            client_id=member.client_id,
            connection_id=member.connection_id,
            silent_seconds=silent,
        )
        member.close(DisconnectReason.HEARTBEAT_TIMEOUT)

    def _ping(self, member: Recipient, now: float) -> None:
        frame = self._constant
        if frame is PING and member.pings_by_protocol:
            frame = None
        elif frame is None:
            try:
                context = member.context
                value = self._payload(member.socket) if context is None else context.run(self._payload, member.socket)
                frame = encode(value)
            except Exception as error:  # the user's function or what it returned; the next beat tries again
                name = (
                    "heartbeat_payload_invalid" if isinstance(error, MessageEncodeError) else "heartbeat_payload_failed"
                )
                self._events.emit_exception(name, error, client_id=member.client_id, connection_id=member.connection_id)
                return
        if member.close_info is None:  # else the function has ended it, and nothing is remembered of it any more
            self._check_queue(member, now)
        if member.ping(frame, now):  # a client that takes nothing is under another watch; a ping would prove nothing
            self._events.counters.pings_sent += 1

    def _push(self, member: Recipient, due: float) -> None:
        liveness = member.liveness
        liveness.due = due
        liveness.recipient = member
        self._count += 1
        heapq.heappush(self._heap, liveness)

    def _arm(self) -> None:
        """Set the one timer to the first entry of the heap."""
        if not self._heap:
            return
        due = self._heap[0].due
        if self._timer is not None:
            if self._timer_due <= due + self._together:
                return
            self._timer.cancel()
        self._timer_due = due + self._together
        self._timer = asyncio.get_running_loop().call_later(
            max(0.0, self._timer_due - monotonic()), self._on_timer, context=self._context
        )

    def _on_timer(self) -> None:
        self._timer = None
        now = monotonic()
        late = now - self._timer_due
        if late >= MAX_TIMER_LAG:
            self._events.emit("event_loop_blocked", logging.WARNING, blocked_seconds=late)
        try:
            self.run_due(now, late)
        finally:
            self._arm()
