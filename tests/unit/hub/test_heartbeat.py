"""Tests of the only heartbeat scheduler of all connections, on a fake clock."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest

from fastapi_ws_stabilizer import scheduling as scheduling_module
from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.connection import stall_watch as send_watch_module
from fastapi_ws_stabilizer.errors import MessageEncodeError
from fastapi_ws_stabilizer.events import EventBus
from fastapi_ws_stabilizer.hub import heartbeat as heartbeat_module
from fastapi_ws_stabilizer.hub.heartbeat import MAX_COALESCE_DELAY, MAX_TIMER_LAG, HeartbeatScheduler
from fastapi_ws_stabilizer.wire.encoded import encode
from tests.support.fake_recipient import FakeRecipient
from tests.support.fake_websocket import eventually, settle
from tests.unit.conftest import EventRecorder


class HeartbeatHarness:
    """A heartbeat on a fake clock, with a record of its events."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        self.now = 1000.0
        self.heard = EventRecorder()
        self.events = EventBus()
        self.events.subscribe(self.heard)
        monkeypatch.setattr(heartbeat_module, "monotonic", lambda: self.now)
        monkeypatch.setattr(scheduling_module, "monotonic", lambda: self.now)
        monkeypatch.setattr(heartbeat_module.random, "uniform", lambda low, high: self.first(low, high))
        self.first = lambda low, high: high
        self.heartbeat = HeartbeatScheduler(WebSocketConfig(**options), self.events)

    def add(self, client_id: str = "ann", **kwargs: Any) -> FakeRecipient:
        """Add a new connection, with its first ping due after one interval."""
        recipient = FakeRecipient(client_id, **kwargs)
        recipient.liveness.on_frame(self.now)
        self.heartbeat.add(recipient)
        return recipient

    def at(self, seconds: float, late: float = 0.0) -> None:
        """Run what is due that many seconds after the start."""
        self.now = 1000.0 + seconds
        self.heartbeat.run_due(self.now, late)

    def pong(self, recipient: FakeRecipient) -> None:
        """Let the client answer."""
        recipient.liveness.on_frame(self.now)
        recipient.liveness.on_pong(self.now)


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch, event_loop_is_running: None) -> Any:
    """Return a factory of heartbeats with fake clocks."""
    made: list[HeartbeatHarness] = []

    def make(**options: Any) -> HeartbeatHarness:
        made.append(HeartbeatHarness(monkeypatch, **options))
        return made[-1]

    yield make
    for one in made:
        one.heartbeat.stop()


@pytest.fixture
async def event_loop_is_running() -> None:
    """Run these tests on an event loop, because adding a connection sets a timer."""


async def test_connection_is_pinged_once_per_interval(harness: Any) -> None:
    """Pings are one interval apart."""
    clock = harness(heartbeat_interval=10)
    recipient = clock.add()
    for second in range(31):
        clock.at(second)
    assert [frame.text for frame in recipient.frames] == ['{"type":"ping"}'] * 3
    assert clock.events.counters.pings_sent == 3


async def test_first_ping_is_delayed_by_random_part_of_interval(harness: Any) -> None:
    """Clients that connect together get their first pings at different times."""
    clock = harness(heartbeat_interval=10)
    asked = []
    clock.first = lambda low, high: asked.append((low, high)) or 3.0
    recipient = clock.add()
    clock.at(2.9)
    assert recipient.frames == []
    clock.at(3.0)
    assert len(recipient.frames) == 1
    assert asked == [(0.0, 10.0)]


async def test_first_pings_are_spread_over_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """With real random numbers, a hundred simultaneous connections are due all over the interval."""
    heartbeat = HeartbeatScheduler(WebSocketConfig(heartbeat_interval=10), EventBus())
    recipients = [FakeRecipient() for _ in range(100)]
    for recipient in recipients:
        heartbeat.add(recipient)
    heartbeat.stop()
    due = sorted(recipient.liveness.next_ping for recipient in recipients)
    assert due[-1] - due[0] > 5.0
    assert len(set(due)) > 90


@pytest.mark.parametrize(("interval", "timeout"), [(10, 25), (10, 60), (30, 5), (10, 10)])
async def test_heartbeat_timeout_is_exact_for_any_interval(harness: Any, interval: float, timeout: float) -> None:
    """A client that stops answering is closed exactly `heartbeat_timeout` after the ping."""
    clock = harness(heartbeat_interval=interval, heartbeat_timeout=timeout)
    recipient = clock.add()
    clock.at(interval)
    clock.pong(recipient)
    clock.at(2 * interval)
    clock.at(2 * interval + timeout - 0.01)
    assert recipient.close_info is None
    clock.at(2 * interval + timeout)
    assert recipient.close_info is not None
    assert recipient.close_info.cause is DisconnectReason.HEARTBEAT_TIMEOUT
    assert len(clock.heartbeat) == 0


async def test_pings_continue_while_pong_is_outstanding(harness: Any) -> None:
    """With a timeout of several intervals, each interval has its ping, and the first open one counts."""
    clock = harness(heartbeat_interval=10, heartbeat_timeout=35, require_pong=True)
    recipient = clock.add()
    for second in range(10, 45):
        clock.at(second)
    assert len(recipient.frames) == 4
    assert recipient.close_info is None
    clock.at(45)
    assert recipient.close_info is not None


async def test_heartbeat_timeout_event_has_silent_seconds(harness: Any) -> None:
    """The event of a timeout has the connection, the client and the seconds of silence."""
    clock = harness(heartbeat_interval=10, heartbeat_timeout=5, require_pong=True)
    recipient = clock.add("bob")
    clock.at(10)
    clock.at(15)
    (report,) = clock.heard.of("heartbeat_timeout")
    assert report.level == logging.INFO
    assert report.fields == {"client_id": "bob", "connection_id": recipient.connection_id, "silent_seconds": 15.0}


async def test_inbound_frames_without_pong_prevent_timeout(harness: Any) -> None:
    """Any inbound frame proves life, even if pongs are required."""
    clock = harness(heartbeat_interval=10, heartbeat_timeout=5, require_pong=True)
    recipient = clock.add()
    for second in range(100):
        clock.at(second)
        recipient.liveness.on_frame(clock.now)
    assert recipient.close_info is None
    assert len(recipient.frames) >= 9


async def test_require_pong_auto_starts_with_first_pong(harness: Any) -> None:
    """With `require_pong="auto"` pongs are required after the client's first pong."""
    clock = harness(heartbeat_interval=10, heartbeat_timeout=5)
    recipient = clock.add()
    for second in range(0, 200, 5):
        clock.at(second)
    assert recipient.close_info is None
    clock.pong(recipient)
    for second in range(200, 220):
        clock.at(second)
    assert recipient.close_info is not None


async def test_require_pong_true_closes_client_without_pong(harness: Any) -> None:
    """With `require_pong=True` a client that never answers is closed."""
    clock = harness(heartbeat_interval=10, heartbeat_timeout=5, require_pong=True)
    recipient = clock.add()
    clock.at(10)
    clock.at(15)
    assert recipient.close_info is not None


async def test_require_pong_false_never_closes_silent_client(harness: Any) -> None:
    """With `require_pong=False` no silent client is closed, even if it has answered before."""
    clock = harness(heartbeat_interval=10, heartbeat_timeout=5, require_pong=False)
    recipient = clock.add()
    clock.at(10)
    clock.pong(recipient)
    for second in range(20, 200, 5):
        clock.at(second)
    assert recipient.close_info is None


async def test_pong_right_after_ping_is_counted(harness: Any) -> None:
    """A pong that arrives right after the ping was queued counts."""
    clock = harness(heartbeat_interval=10, heartbeat_timeout=5, require_pong=True)
    recipient = clock.add()

    send = recipient.ping

    def answer_at_once(connection: Any, frame: Any, now: float) -> bool:
        asyncio.get_running_loop().call_soon(clock.pong, recipient)
        return send(connection, frame, now)

    recipient.ping = answer_at_once  # type: ignore[method-assign]
    clock.at(10)
    await eventually(lambda: recipient.liveness.has_ponged)
    clock.at(15)
    clock.at(19.9)
    assert recipient.close_info is None
    assert recipient.liveness.rtt == 0.0


async def test_full_outbox_suspends_ping_and_timeout(harness: Any) -> None:
    """A ping that finds no room expects no answer."""
    clock = harness(heartbeat_interval=10, heartbeat_timeout=5, require_pong=True)
    recipient = clock.add(room=False)
    for second in range(10, 60):
        clock.at(second)
    assert recipient.close_info is None
    assert clock.events.counters.pings_sent == 0
    recipient.room = True
    clock.at(60)
    assert len(recipient.frames) == 1


async def test_paused_reading_suspends_heartbeat_timeout(harness: Any) -> None:
    """While the server does not read, missing answers are ignored."""
    clock = harness(heartbeat_interval=10, heartbeat_timeout=5, require_pong=True)
    recipient = clock.add()
    clock.at(10)
    recipient.pause = object()
    for second in range(11, 100):
        clock.at(second)
    assert recipient.close_info is None


async def test_ping_behind_send_queue_suspends_timeout(harness: Any) -> None:
    """A client cannot see a ping behind queued messages; when these are sent, the timeout applies again."""
    clock = harness(heartbeat_interval=10, heartbeat_timeout=5, require_pong=True)
    recipient = clock.add()
    recipient.backlog = True
    for second in range(10, 100):
        clock.at(second)
    assert recipient.close_info is None
    recipient.backlog = False
    for second in range(100, 130):
        clock.at(second)
    assert recipient.close_info is not None


async def test_send_on_every_iteration_does_not_defer_timeout(harness: Any, bench: Any) -> None:
    """A message that waits only for the end of the iteration is not a backlog, and excuses no missing answer."""
    clock = harness(heartbeat_interval=10, heartbeat_timeout=5, require_pong=True)
    b = bench()
    connection, _ = await b.open()
    connection.liveness.on_frame(clock.now)
    clock.heartbeat.add(connection)
    for second in range(10, 16):
        assert connection.enqueue(encode("news"))
        clock.at(second)
        await settle()
    assert connection.close_info.cause is DisconnectReason.HEARTBEAT_TIMEOUT


async def test_stalled_send_does_not_cause_heartbeat_timeout(
    harness: Any, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ping behind a stalled send cannot be answered, and send_timeout watches that client."""
    monkeypatch.setattr(send_watch_module, "STALL_THRESHOLD", -1.0)
    clock = harness(heartbeat_interval=10, heartbeat_timeout=5, require_pong=True)
    b = bench()
    connection, _ = await b.open()
    connection.liveness.on_frame(clock.now)
    clock.heartbeat.add(connection)
    b.server.block()
    connection.enqueue(encode("stuck"))
    await b.server.until(lambda: len(b.server.offered) == 2)
    for second in range(10, 100):
        clock.at(second)
    assert connection.close_info is None


async def test_late_timer_grants_grace_before_timeout(harness: Any) -> None:
    """After a blocked event loop no client is closed before the server could read its socket."""
    clock = harness(heartbeat_interval=100, heartbeat_timeout=5, require_pong=True)
    recipient = clock.add()
    clock.at(100)
    clock.at(112, late=7.0)
    assert recipient.close_info is None
    clock.at(112.9)
    assert recipient.close_info is None
    clock.at(113)
    assert recipient.close_info is not None


async def test_grace_after_lag_is_at_most_heartbeat_timeout(harness: Any) -> None:
    """With a short timeout, the grace after a lag is at most that timeout."""
    clock = harness(heartbeat_interval=100, heartbeat_timeout=0.25, require_pong=True)
    recipient = clock.add()
    clock.at(100)
    clock.at(101, late=MAX_TIMER_LAG)
    assert recipient.close_info is None
    clock.at(101.25)
    assert recipient.close_info is not None


async def test_timer_lag_below_maximum_grants_no_grace(harness: Any) -> None:
    """A heartbeat that is less than 0.5 s late is on time."""
    clock = harness(heartbeat_interval=100, heartbeat_timeout=5, require_pong=True)
    recipient = clock.add()
    clock.at(100)
    clock.at(105.4, late=MAX_TIMER_LAG - 0.1)
    assert recipient.close_info is not None


async def test_closed_connection_is_removed_from_heartbeat(harness: Any) -> None:
    """A closed connection is neither pinged nor referenced."""
    clock = harness(heartbeat_interval=10)
    recipient = clock.add()
    recipient.close(DisconnectReason.CLIENT_CLOSE)
    clock.at(10)
    assert recipient.frames == []
    assert len(clock.heartbeat) == 0


async def test_removed_connection_is_not_pinged(harness: Any) -> None:
    """After `remove` a connection gets no pings, and the others do."""
    clock = harness(heartbeat_interval=10)
    removed, other = clock.add("removed"), clock.add("other")
    clock.heartbeat.remove(removed)
    clock.heartbeat.remove(removed)
    assert len(clock.heartbeat) == 1
    clock.at(10)
    assert (len(removed.frames), len(other.frames)) == (0, 1)


async def test_removed_connections_do_not_grow_heap(harness: Any) -> None:
    """After any number of removals, the heap is not much larger than the number of connections."""
    clock = harness(heartbeat_interval=10)
    staying = [clock.add() for _ in range(3)]
    for _ in range(10):
        for recipient in [clock.add() for _ in range(100)]:
            clock.heartbeat.remove(recipient)
    assert len(clock.heartbeat) == 3
    assert len(clock.heartbeat._deadlines._entries) <= 64 + 1
    clock.at(10)
    assert [len(recipient.frames) for recipient in staying] == [1, 1, 1]


async def test_full_outbox_does_not_delay_pings_to_others(harness: Any) -> None:
    """A client with a full outbox does not affect the others."""
    clock = harness(heartbeat_interval=10)
    stuck = clock.add(room=False)
    others = [clock.add() for _ in range(3)]
    clock.at(10)
    assert stuck.frames == []
    assert [len(recipient.frames) for recipient in others] == [1, 1, 1]


@pytest.mark.parametrize("payload", ["beat", {"kind": "beat"}, b"\x01"])
async def test_custom_payload_is_sent_and_encoded_once(harness: Any, payload: Any) -> None:
    """With `heartbeat_type="custom"` the heartbeat is the user's own message, encoded once."""
    clock = harness(heartbeat_interval=10, heartbeat_type="custom", heartbeat_payload=payload)
    recipient = clock.add()
    clock.at(10)
    clock.at(20)
    first, second = recipient.frames
    assert first is second
    sent = first.data if first.text is None else first.text
    assert sent == payload or json.loads(sent) == payload


async def test_payload_function_receives_socket(harness: Any) -> None:
    """A callable payload is called for each heartbeat with the connection's socket."""
    clock = harness(heartbeat_interval=10, heartbeat_type="custom", heartbeat_payload=lambda socket: {"for": socket})
    recipient = clock.add()
    clock.at(10)
    assert json.loads(recipient.frames[0].text) == {"for": recipient.socket}


async def test_failing_payload_function_is_reported_and_retried(harness: Any) -> None:
    """A bug in the payload function is reported, affects no other connection, and the next heartbeat retries."""
    answers: list[Any] = [ValueError("bug"), object(), "beat"]

    def payload(socket: Any) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    clock = harness(heartbeat_interval=10, heartbeat_type="custom", heartbeat_payload=payload)
    recipient = clock.add()
    clock.at(10)
    clock.at(20)
    clock.at(30)
    assert clock.heard.events == ["heartbeat_payload_failed", "heartbeat_payload_invalid"]
    assert isinstance(clock.heard.all[1].error, MessageEncodeError)
    assert [frame.text for frame in recipient.frames] == ["beat"]


async def test_unencodable_payload_raises_at_construction() -> None:
    """A constant payload that cannot be encoded fails at construction and not at each heartbeat."""
    config = WebSocketConfig(heartbeat_type="custom", heartbeat_payload={"x": object()})
    with pytest.raises(MessageEncodeError):
        HeartbeatScheduler(config, EventBus())


async def test_payload_function_closing_connection_unschedules_it(harness: Any) -> None:
    """A connection that its own payload function has closed is not scheduled again."""
    clock = harness(heartbeat_interval=10, heartbeat_type="custom", heartbeat_payload=lambda socket: end())
    recipient = clock.add()

    def end() -> str:
        recipient.close(DisconnectReason.APPLICATION)
        recipient.room = False
        clock.heartbeat.remove(recipient)
        return "bye"

    clock.at(10)
    assert len(clock.heartbeat) == 0


async def test_heartbeat_off_schedules_nothing(harness: Any) -> None:
    """With `heartbeat_type="off"` no connection is scheduled and no timer is set."""
    clock = harness(heartbeat_type="off")
    recipient = clock.add()
    clock.at(1000)
    assert len(clock.heartbeat) == 0
    assert clock.heartbeat._deadlines.timer is None
    clock.heartbeat.remove(recipient)
    assert recipient.frames == []


# ── the timer ──


async def test_heartbeat_timer_pings_on_real_clock() -> None:
    """On the real clock, the timer pings a connection."""
    heartbeat = HeartbeatScheduler(WebSocketConfig(heartbeat_interval=0.02), EventBus())
    recipient = FakeRecipient()
    heartbeat.add(recipient)
    await eventually(lambda: len(recipient.frames) >= 2)
    heartbeat.stop()
    assert len(heartbeat) == 0
    assert heartbeat._deadlines.timer is None


async def test_all_connections_share_one_heartbeat_timer(harness: Any) -> None:
    """For any number of connections the event loop has one timer, shortly after the first is due."""
    clock = harness(heartbeat_interval=10)
    firsts = iter([5.0, 7.0, 2.0, 9.0])
    clock.first = lambda low, high: next(firsts)
    timers = []
    for _ in range(4):
        clock.add()
        timers.append(clock.heartbeat._deadlines.timer)
    assert timers[0] is timers[1]
    assert timers[0].cancelled()
    assert timers[2] is timers[3]
    assert not timers[2].cancelled()
    assert clock.heartbeat._deadlines.timer_due == 1002.0 + MAX_COALESCE_DELAY


async def test_blocked_event_loop_is_reported_and_grants_grace(harness: Any) -> None:
    """A timer that fires 0.5 s late or more is logged as a warning, and grants a grace."""
    clock = harness(heartbeat_interval=10, heartbeat_timeout=5, require_pong=True)
    recipient = clock.add()
    clock.at(10)
    clock.heartbeat._deadlines.timer_due = 1015.0
    clock.now = 1018.0
    clock.heartbeat._deadlines._on_timer()
    assert recipient.close_info is None
    (report,) = clock.heard.of("event_loop_blocked")
    assert report.level == logging.WARNING
    assert report.fields == {"blocked_seconds": 3.0}
    assert clock.heartbeat._deadlines.timer is not None


async def test_heartbeat_of_many_connections_yields_to_event_loop(
    harness: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pings due after a long block continue in the next iteration, and each client gets exactly one."""
    looks = iter(range(10**6))
    clock = harness(heartbeat_interval=10)
    due = 1010.0 + MAX_COALESCE_DELAY
    monkeypatch.setattr(scheduling_module, "monotonic", lambda: due + next(looks) * scheduling_module.MAX_BLOCK)
    recipients = [clock.add() for _ in range(9)]
    clock.now = due
    clock.heartbeat._deadlines.timer.cancel()
    clock.heartbeat._deadlines._on_timer()
    assert 0 < sum(len(recipient.frames) for recipient in recipients) < 9
    await eventually(lambda: all(recipient.frames for recipient in recipients))
    assert [len(recipient.frames) for recipient in recipients] == [1] * 9


async def test_heartbeat_stop_is_idempotent(harness: Any) -> None:
    """A stopped heartbeat has no connections and no timer, and can be stopped again."""
    clock = harness()
    clock.add()
    clock.heartbeat.stop()
    clock.heartbeat.stop()
    assert len(clock.heartbeat) == 0
    clock.heartbeat._deadlines._on_timer()
    assert clock.heartbeat._deadlines.timer is None


# ── bytes in transit ──


async def test_partial_inbound_message_restarts_timeout(harness: Any) -> None:
    """Bytes received since the ping restart the timeout at the last of them."""
    clock = harness(heartbeat_interval=10, heartbeat_timeout=15, require_pong=True)
    recipient = clock.add()
    clock.at(10)
    recipient.silent = 2.0
    clock.at(25)
    assert recipient.close_info is None
    assert clock.now - recipient.liveness.last_seen == 2.0
    recipient.silent = 16.9
    clock.at(37.9)
    assert recipient.close_info is None
    recipient.silent = 17.0
    clock.at(38)
    assert recipient.close_info is not None
    assert recipient.close_info.cause is DisconnectReason.HEARTBEAT_TIMEOUT


async def test_never_completed_inbound_message_is_closed(harness: Any) -> None:
    """A trickle of bytes holds a connection no longer than the largest message takes at the slowest rate."""
    clock = harness(heartbeat_interval=10, heartbeat_timeout=15, require_pong=True, max_message_size=40 * 4096)
    recipient = clock.add()
    recipient.silent = 1.0
    for second in range(10, 65):
        clock.at(second)
        assert recipient.close_info is None, second
    clock.at(65)  # the ping, 40 s, and the timeout
    assert recipient.close_info is not None


async def test_message_time_limit_restarts_with_each_message(harness: Any) -> None:
    """The limit applies to each message, and not to the connection."""
    clock = harness(heartbeat_interval=10, heartbeat_timeout=15, require_pong=True, max_message_size=40 * 4096)
    recipient = clock.add()
    recipient.silent = 1.0
    for second in range(10, 300):
        if second % 50 == 0:
            recipient.liveness.on_frame(1000.0 + second)
        clock.at(second)
        assert recipient.close_info is None, second


async def test_outbound_progress_before_ping_defers_timeout(harness: Any) -> None:
    """The timeout of a ping behind a large message runs from the last check at which its client had taken more."""
    clock = harness(heartbeat_interval=10, heartbeat_timeout=15, require_pong=True)
    recipient = clock.add()
    recipient.unsent, recipient.taken = 100_000, 5_000
    clock.at(10)
    for second in range(11, 60):
        recipient.taken += 2_000
        clock.at(second)
        assert recipient.close_info is None, second
    clock.at(60)
    clock.at(74.9)
    assert recipient.close_info is None
    clock.at(75)
    assert recipient.close_info is not None


@pytest.mark.parametrize(("unsent", "taken"), [(16 * 1024 - 1, 100_000), (20_000, 0), (None, None)])
async def test_outbound_bytes_without_progress_do_not_defer_timeout(
    harness: Any, unsent: int | None, taken: int | None
) -> None:
    """Few bytes before a ping do not delay a pong, and bytes without progress do not prove life."""
    clock = harness(heartbeat_interval=10, heartbeat_timeout=15, require_pong=True)
    recipient = clock.add()
    recipient.unsent, recipient.taken = unsent, 0 if taken is not None else None
    clock.at(10)
    recipient.taken = taken
    clock.at(25)
    assert recipient.close_info is not None


async def test_outbound_progress_after_ping_does_not_defer_timeout(harness: Any) -> None:
    """A client that acknowledges bytes but never answers is closed at most one timeout later."""
    clock = harness(heartbeat_interval=10, heartbeat_timeout=15, require_pong=True)
    recipient = clock.add()
    recipient.unsent, recipient.taken = 20_000, 0
    for second in range(10, 41):
        clock.at(second)
        recipient.taken += 10_000
    assert recipient.close_info is not None


async def test_removed_or_answering_client_leaves_no_ping_state(harness: Any) -> None:
    """The ping state is removed with its client, and reset at the next ping after an answer."""
    clock = harness(heartbeat_interval=10, heartbeat_timeout=15, require_pong=True)
    recipients = [clock.add(str(number)) for number in range(3)]
    for recipient in recipients:
        recipient.unsent, recipient.taken = 20_000, 0
    clock.at(10)
    assert len(clock.heartbeat._unanswered) == 3
    clock.heartbeat.remove(recipients[0])
    clock.pong(recipients[1])
    recipients[1].unsent = 0
    clock.at(20)
    assert list(clock.heartbeat._unanswered) == [recipients[2].liveness]
    clock.heartbeat.stop()
    assert not clock.heartbeat._unanswered


async def test_payload_function_closing_connection_leaves_no_state(harness: Any) -> None:
    """Bytes in transit to a client that has just closed leave no state."""
    recipients: list[FakeRecipient] = []

    def payload(_: object) -> str:
        clock.heartbeat.remove(recipients[0])
        recipients[0].close(DisconnectReason.APPLICATION)
        return "ping"

    clock = harness(heartbeat_interval=10, heartbeat_type="custom", heartbeat_payload=payload)
    recipients.append(clock.add())
    recipients[0].unsent, recipients[0].taken = 20_000, 0
    clock.at(10)
    assert not clock.heartbeat._unanswered
