"""Tests of the rules for resuming, in their order, and of the expiry of detached sessions."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

import pytest

from fastapi_ws_stabilizer.close_codes import CloseInfo, DisconnectReason, local_close
from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.errors import RequestError
from fastapi_ws_stabilizer.events import EventBus
from fastapi_ws_stabilizer.sessions import store as store_module
from fastapi_ws_stabilizer.sessions.session import Session
from fastapi_ws_stabilizer.sessions.store import ResumeResult, SessionStore, StaleAttemptError
from fastapi_ws_stabilizer.wire.encoded import EncodedMessage, encode
from fastapi_ws_stabilizer.wire.v1.hello import Hello, ResumeOutcome
from tests.support.fake_attachment import FakeAttachment
from tests.support.fake_websocket import settle
from tests.support.virtual_time import run_virtually
from tests.unit.conftest import EventRecorder

NONE, FULL, GAP, LOST = ResumeOutcome.NONE, ResumeOutcome.FULL, ResumeOutcome.GAP, ResumeOutcome.LOST


class StoreHarness:
    """Session store with its events, and clients that connect to it.

    Attributes:
        began: Sessions that have begun.
        ended: Sessions that have ended.
        close_infos: Their close infos.
    """

    def __init__(self, **options: Any) -> None:
        self.events, self.heard = EventBus(), EventRecorder()
        self.events.subscribe(self.heard)
        self.began: list[Session] = []
        self.ended: list[Session] = []
        self.close_infos: list[CloseInfo] = []
        numbers = itertools.count()
        self.sessions = SessionStore(
            WebSocketConfig(**options),
            self.events,
            next_shard=lambda: next(numbers),
        )
        self.sessions.listener = self

    def on_session_began(self, session: Session) -> None:
        """Record the session."""
        self.began.append(session)

    def on_session_ended(self, session: Session, close_info: CloseInfo) -> None:
        """Record the session and its close info."""
        self.ended.append(session)
        self.close_infos.append(close_info)

    def hello(
        self,
        dial: int = 1,
        token: str | None = None,
        seq: int = 0,
        *,
        client_id: str = "ann",
        instance: str | None = None,
    ) -> ResumeResult:
        """Send a hello."""
        return self.sessions.resume(Hello(dial, token, seq, None, instance), client_id)

    def connect(
        self, dial: int = 1, token: str | None = None, seq: int = 0, **options: Any
    ) -> tuple[ResumeResult, str, FakeAttachment]:
        """Send a hello, get a welcome with a token, and attach a connection."""
        resume_result = self.hello(dial, token, seq, **options)
        connection = FakeAttachment()
        self.sessions.on_attached(resume_result.session)
        new = resume_result.session.new_token()
        resume_result.session.attach(connection, resume_result.cursor, EncodedMessage("welcome"))
        return resume_result, new, connection

    def lose(self, session: Session) -> None:
        """Lose the connection of a session."""
        connection = session.connection
        assert isinstance(connection, FakeAttachment)
        connection.close(DisconnectReason.NETWORK_LOST, code=1011)
        assert session.detach(connection)
        self.sessions.on_detached(session)

    def outcome(self, *args: Any, **options: Any) -> tuple[ResumeOutcome, str | None, int]:
        """Return the outcome of a hello."""
        resume_result = self.hello(*args, **options)
        return resume_result.outcome, resume_result.why, resume_result.cursor


def say(session: Session, count: int) -> None:
    """Send some messages to a session."""
    for number in range(count):
        session.outbox.offer(encode(number))


async def test_hello_without_token_gets_new_session() -> None:
    """`none`: a client without a token gets a new session, in a shard, which can be looked up by its id."""
    harness = StoreHarness()
    resume_result = harness.hello()
    session = resume_result.session
    assert (resume_result.outcome, resume_result.why, resume_result.cursor) == (NONE, None, 0)
    assert harness.began == [session]
    assert harness.sessions.get(session.connection_id) is session
    assert (session.client_id, session.shard, session.last_attempt) == ("ann", 0, 1)
    assert harness.hello(2).session is not session
    assert len(harness.sessions) == 2


async def test_client_without_missed_messages_resumes_fully() -> None:
    """`full`: the replay may be empty."""
    harness = StoreHarness()
    before, token, _ = harness.connect()
    say(before.session, 3)
    harness.lose(before.session)
    resume_result = harness.hello(2, token, 3)
    assert resume_result == ResumeResult(before.session, FULL, None, 3)
    assert len(before.session.buffer.entries) == 0
    assert harness.events.counters.sessions_resumed == 1


async def test_full_resume_replays_exactly_missed_messages() -> None:
    """`full`: the messages after the presented number follow the welcome, including those sent while detached."""
    harness = StoreHarness()
    before, token, _ = harness.connect()
    say(before.session, 2)
    harness.lose(before.session)
    before.session.outbox.offer(encode("detached"))
    _, _, connection = harness.connect(2, token, 1)
    assert connection.texts == ["welcome", '{"type":"msg","data":1}', '{"type":"msg","data":"detached"}']
    assert harness.sessions.detached_count == 0


async def test_presented_number_acknowledges_messages() -> None:
    """Messages up to the presented number are removed, and senders that wait for them continue."""
    harness = StoreHarness()
    before, token, _ = harness.connect()
    say(before.session, 3)
    harness.lose(before.session)
    harness.hello(2, token, 2)
    await before.session.requests.until_acknowledged(2)
    assert before.session.buffer.first_seq == 3


async def test_unknown_token_is_lost_session() -> None:
    """`lost/unknown`: a session that does not exist, and a secret that is not the session's."""
    harness = StoreHarness()
    session, token, _ = harness.connect()
    for number, bogus in enumerate(("", ".", "unknown.x", f"{session.session.connection_id}.x", token + "x"), 2):
        assert harness.outcome(number, bogus, 5) == (LOST, "unknown", 0)
    assert harness.heard.of("session_lost")[0].fields["why"] == "unknown"
    assert harness.events.counters.sessions_lost == 5
    assert harness.hello(99, token).session is session.session


async def test_expired_session_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """`lost/expired`: after its ttl a session is ended, even if no timer has done it."""
    harness = StoreHarness(session_ttl=10)
    now = [1000.0]
    monkeypatch.setattr(store_module, "monotonic", lambda: now[0])
    before, token, _ = harness.connect()
    harness.lose(before.session)
    now[0] += 10
    resume_result = harness.hello(2, token)
    assert (resume_result.outcome, resume_result.why) == (LOST, "expired")
    assert resume_result.session is not before.session
    assert harness.ended == [before.session]
    harness.sessions.stop()


async def test_token_of_other_client_starts_new_session() -> None:
    """`lost/denied`: a valid token of another principal leads to a new session of the presenter."""
    harness = StoreHarness()
    before, token, _ = harness.connect()
    resume_result = harness.hello(7, token, client_id="eve")
    assert (resume_result.outcome, resume_result.why, resume_result.session.client_id) == (LOST, "denied", "eve")
    assert before.session.last_attempt == 1
    assert harness.hello(2, token).session is before.session


async def test_late_attempt_with_token_is_stale() -> None:
    """An attempt with a number not above the session's highest is one that its client has abandoned."""
    harness = StoreHarness()
    before, token, connection = harness.connect(3)
    for dial in (1, 2, 3):
        with pytest.raises(StaleAttemptError):
            harness.hello(dial, token)
    assert before.session.connection is connection
    assert harness.hello(4, token).outcome is FULL


async def test_late_attempt_with_consumed_token_is_stale() -> None:
    """The newer attempt may have used the token: the late one is closed, and gets no new session."""
    harness = StoreHarness()
    before, first, _ = harness.connect(1)
    _, second, _ = harness.connect(3, first)
    before.session.present(second.partition(".")[2])
    with pytest.raises(StaleAttemptError):
        harness.hello(2, first)
    assert len(harness.sessions) == 1


async def test_late_attempt_without_token_is_stale() -> None:
    """A first attempt that arrives after the second one is closed, if its client names its instance."""
    harness = StoreHarness()
    resume_result = harness.hello(2, instance="tab-1")
    with pytest.raises(StaleAttemptError):
        harness.hello(1, instance="tab-1")
    assert harness.hello(1, instance="tab-2").outcome is NONE
    assert harness.hello(1, instance="tab-1", client_id="bob").outcome is NONE
    assert harness.hello(3, instance="tab-1").session is not resume_result.session


async def test_client_instance_is_forgotten_with_its_session() -> None:
    """An ended session makes no later attempt stale."""
    harness = StoreHarness()
    first = harness.hello(2, instance="tab-1").session
    second = harness.hello(3, instance="tab-1").session
    harness.sessions.end(first, local_close(DisconnectReason.COMPLETED))
    with pytest.raises(StaleAttemptError):
        harness.hello(1, instance="tab-1")
    harness.sessions.end(second, local_close(DisconnectReason.COMPLETED))
    assert harness.hello(1, instance="tab-1").outcome is NONE
    assert len(harness.sessions._of_instance) == 1


async def test_lost_welcome_keeps_presented_token_valid() -> None:
    """The token presented last is valid beside the newest one, until that is confirmed."""
    harness = StoreHarness()
    before, first, _ = harness.connect(1)
    assert harness.connect(2, first)[0].outcome is FULL
    assert harness.connect(3, first)[0].outcome is FULL
    _, newest, _ = harness.connect(4, first)
    before.session.confirm()
    assert harness.outcome(5, first)[:2] == (LOST, "unknown")
    assert harness.hello(6, newest).session is before.session


async def test_presented_newest_token_invalidates_older() -> None:
    """When the newest token is presented, the one before it is invalid."""
    harness = StoreHarness()
    _, first, _ = harness.connect(1)
    _, second, _ = harness.connect(2, first)
    harness.connect(3, second)
    assert harness.outcome(4, first)[:2] == (LOST, "unknown")


async def test_token_of_earlier_epoch_is_gap() -> None:
    """`gap/epoch`: numbers from before a rewind may mean other messages, so nothing is replayed."""
    harness = StoreHarness()
    before, token, _ = harness.connect()
    say(before.session, 5)
    harness.lose(before.session)
    before.session.rewind(2)
    say(before.session, 4)
    assert harness.outcome(2, token, 5) == (GAP, "epoch", 7)
    assert harness.hello(3, before.session.new_token(), 7).outcome is FULL


async def test_number_ahead_of_server_is_gap() -> None:
    """`gap/ahead`: a client with a number above the server's has another history."""
    harness = StoreHarness()
    before, token, _ = harness.connect()
    say(before.session, 2)
    assert harness.outcome(2, token, 3) == (GAP, "ahead", 2)


async def test_overflowed_buffer_is_gap_without_replay() -> None:
    """`gap/overflow`: a client that missed more than is stored gets none of it, and a gap."""
    harness = StoreHarness(replay_max_messages=3)
    before, token, _ = harness.connect()
    say(before.session, 5)
    _, newer, connection = harness.connect(2, token, 1)
    assert connection.texts == ["welcome"]
    assert (before.session.head, len(before.session.buffer.entries)) == (5, 0)
    fields = harness.heard.of("session_gap")[0].fields
    assert (fields["why"], fields["missed_messages"]) == ("overflow", 4)
    assert harness.events.counters.session_gaps == 1
    assert harness.hello(3, newer, 5).outcome is FULL


async def test_gap_fails_ack_waiters_of_missed_messages() -> None:
    """Waiters for messages in a gap fail, because the client has not received them."""
    harness = StoreHarness(replay_max_messages=1)
    before, token, _ = harness.connect()
    say(before.session, 3)
    got, missed = (asyncio.ensure_future(before.session.requests.until_acknowledged(seq)) for seq in (1, 2))
    await settle()
    assert harness.outcome(2, token, 1) == (GAP, "overflow", 3)
    before.session.acknowledge(3)
    await settle()
    assert got.exception() is None
    assert isinstance(missed.exception(), RequestError)


async def test_client_missing_exactly_stored_messages_resumes_fully() -> None:
    """A client that missed exactly the stored messages gets all of them."""
    harness = StoreHarness(replay_max_messages=3)
    before, token, _ = harness.connect()
    say(before.session, 5)
    resume_result = harness.hello(2, token, 2)
    assert (resume_result.outcome, len(before.session.buffer.since(2))) == (FULL, 3)


async def test_expired_messages_are_overflow_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Expired messages are not replayed either."""
    harness = StoreHarness(replay_max_age=10)
    before, token, _ = harness.connect()
    say(before.session, 2)
    later = store_module.monotonic() + 11
    monkeypatch.setattr("fastapi_ws_stabilizer.sessions.replay_buffer.monotonic", lambda: later)
    assert harness.outcome(2, token, 1) == (GAP, "overflow", 2)


async def test_epoch_is_checked_before_numbers() -> None:
    """Of several reasons for a gap, the first in the protocol's order is reported."""
    harness = StoreHarness(replay_max_messages=1)
    before, token, _ = harness.connect()
    say(before.session, 5)
    session = before.session
    assert store_module.gap_reason(session, 1, 99) == "epoch"
    assert store_module.gap_reason(session, 0, 99) == "ahead"
    assert store_module.gap_reason(session, 0, 3) == "overflow"
    assert store_module.gap_reason(session, 0, 4) is None
    assert store_module.gap_reason(session, 0, 5) is None
    assert token


async def test_takeover_moves_session_to_new_connection() -> None:
    """The next connection takes over the session of a half-open one at once; the close of the old one has no effect."""
    harness = StoreHarness()
    before, token, old = harness.connect()
    resume_result = harness.hello(2, token)
    new = FakeAttachment()
    assert resume_result.session.attach(new, resume_result.cursor, EncodedMessage("welcome")) is old
    assert not before.session.detach(old)
    assert before.session.connection is new


# ── expiry ──


def in_time(body: Callable[[], Any]) -> None:
    """Run a test in virtual time."""
    run_virtually(body())


def test_detached_session_ends_after_ttl() -> None:
    """A session ends after its ttl, with an event, and with the close info of its last connection."""

    async def body() -> None:
        harness = StoreHarness(session_ttl=10)
        resume_result, token, connection = harness.connect()
        say(resume_result.session, 2)
        harness.lose(resume_result.session)
        resume_result.session.socket = connection
        assert harness.sessions.detached_of("ann") == [resume_result.session]
        await asyncio.sleep(9.9)
        assert harness.ended == []
        await asyncio.sleep(0.2)
        assert harness.ended == [resume_result.session]
        assert harness.close_infos == [resume_result.session.ended] == [connection.close_info]
        assert harness.events.counters.messages_discarded == 2
        assert harness.sessions.detached_of("ann") == []
        assert (len(harness.sessions), harness.sessions.detached_count) == (0, 0)
        assert harness.heard.of("session_ended")[0].fields["unacknowledged"] == 2
        assert harness.outcome(2, token)[:2] == (LOST, "unknown")

    in_time(body)


def test_resume_in_time_keeps_session() -> None:
    """Resuming stops the expiry, and detaching again restarts it."""

    async def body() -> None:
        harness = StoreHarness(session_ttl=10)
        resume_result, token, _ = harness.connect()
        harness.lose(resume_result.session)
        await asyncio.sleep(9)
        harness.connect(2, token)
        await asyncio.sleep(60)
        assert harness.ended == []
        harness.lose(resume_result.session)
        await asyncio.sleep(9)
        assert harness.ended == []
        await asyncio.sleep(2)
        assert harness.ended == [resume_result.session]

    in_time(body)


def test_each_session_has_its_own_deadline() -> None:
    """One timer serves all sessions, each at its deadline."""

    async def body() -> None:
        harness = StoreHarness(session_ttl=10)
        sessions = []
        for number in range(3):
            resume_result, _, _ = harness.connect(client_id=f"client-{number}")
            harness.lose(resume_result.session)
            sessions.append(resume_result.session)
            await asyncio.sleep(3)
        for number in range(3):
            assert harness.ended == sessions[:number]
            await asyncio.sleep(1.5 if number == 0 else 3)
        assert harness.ended == sessions
        assert harness.sessions._timer is None

    in_time(body)


def test_mass_expiry_ends_bounded_batches_per_iteration() -> None:
    """At most `AT_ONCE` sessions end in one iteration, and all of them eventually."""

    async def body() -> None:
        harness = StoreHarness(session_ttl=10)
        for number in range(2 * store_module.AT_ONCE + 1):
            harness.lose(harness.connect(client_id=str(number))[0].session)
        await asyncio.sleep(10.001)
        assert 0 < len(harness.ended) <= 2 * store_module.AT_ONCE + 1
        await settle()
        assert len(harness.ended) == 2 * store_module.AT_ONCE + 1

    in_time(body)


async def test_oldest_detached_session_is_evicted_with_warning() -> None:
    """Above the limit, the session that was detached first ends with a warning."""
    harness = StoreHarness(max_detached_sessions=2)
    sessions = [harness.connect(client_id=client_id)[0].session for client_id in ("ann", "bob", "cid")]
    for session in sessions:
        harness.lose(session)
    assert harness.ended == [sessions[0]]
    assert harness.sessions.detached_count == 2
    assert [report.fields["client_id"] for report in harness.heard.of("session_evicted")] == ["ann"]
    harness.sessions.stop()


async def test_disabled_reconnect_ends_session_with_connection() -> None:
    """With `enable_reconnect=False` a session ends with its connection."""
    harness = StoreHarness(enable_reconnect=False)
    session = harness.connect()[0].session
    harness.lose(session)
    assert harness.ended == [session]
    assert session.ended is not None
    assert harness.sessions.detached_count == 0


async def test_session_ends_once() -> None:
    """Ending a session again changes nothing, and an ended session is never detached."""
    harness = StoreHarness()
    session = harness.connect()[0].session
    harness.sessions.end(session, local_close(DisconnectReason.APPLICATION))
    harness.sessions.end(session, local_close(DisconnectReason.COMPLETED))
    harness.sessions.on_detached(session)
    assert harness.ended == [session]
    assert harness.sessions.detached_count == 0


async def test_detached_session_can_be_ended() -> None:
    """A detached session can be ended, and its client gets `lost` when it tries to resume."""
    harness = StoreHarness()
    resume_result, token, _ = harness.connect()
    harness.lose(resume_result.session)
    assert resume_result.session.close(DisconnectReason.APPLICATION, code=4410)
    assert harness.ended == [resume_result.session]
    assert resume_result.session.ended is not None
    assert resume_result.session.ended.code == 4410
    assert harness.outcome(2, token)[:2] == (LOST, "unknown")
    harness.sessions.stop()


async def test_shutdown_ends_all_sessions() -> None:
    """A shutdown ends every session, attached or detached, and leaves no timer."""
    harness = StoreHarness()
    attached, detached = harness.connect(client_id="ann")[0].session, harness.connect(client_id="bob")[0].session
    harness.lose(detached)
    assert harness.sessions.stop() == [attached, detached]
    assert harness.ended == [attached, detached]
    assert (len(harness.sessions), harness.sessions.detached_count, harness.sessions._timer) == (0, 0, None)
    assert harness.sessions.stop() == []


async def test_session_events_contain_no_token() -> None:
    """Events about sessions contain no secret."""
    harness = StoreHarness(replay_max_messages=1)
    resume_result, token, _ = harness.connect()
    say(resume_result.session, 5)
    harness.hello(2, token, 1)
    harness.hello(3, "x." + token, 1)
    harness.sessions.stop()
    secret = token.partition(".")[2]
    assert harness.heard.events == ["session_gap", "session_lost", "session_ended", "session_ended"]
    assert all(secret not in repr(report) for report in harness.heard.all)
    assert secret not in repr(resume_result)
