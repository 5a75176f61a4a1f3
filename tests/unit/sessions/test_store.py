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
from fastapi_ws_stabilizer.sessions.session import ResumeOutcome, Session
from fastapi_ws_stabilizer.sessions.store import ResumeResult, SessionStore, StaleAttemptError
from fastapi_ws_stabilizer.wire.encoded import EncodedMessage, encode
from fastapi_ws_stabilizer.wire.v1.hello import Hello
from tests.support.fake_attachment import FakeAttachment
from tests.support.fake_websocket import settle
from tests.support.virtual_time import run_virtually
from tests.unit.conftest import EventRecorder

NONE, FULL, GAP, LOST = ResumeOutcome.NONE, ResumeOutcome.FULL, ResumeOutcome.GAP, ResumeOutcome.LOST


class Shop:
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
        self.endings: list[CloseInfo] = []
        numbers = itertools.count()
        self.sessions = SessionStore(
            WebSocketConfig(**options),
            self.events,
            next_shard=lambda: next(numbers),
            began=self.began.append,
            ended=self._end,
        )

    def _end(self, session: Session, how: CloseInfo) -> None:
        self.ended.append(session)
        self.endings.append(how)

    def greet(
        self, dial: int = 1, token: str | None = None, seq: int = 0, *, who: str = "ann", instance: str | None = None
    ) -> ResumeResult:
        """Send a hello."""
        return self.sessions.resume(Hello(dial, token, seq, None, instance), who)

    def connect(
        self, dial: int = 1, token: str | None = None, seq: int = 0, **options: Any
    ) -> tuple[ResumeResult, str, FakeAttachment]:
        """Send a hello, get a welcome with a token, and attach a connection."""
        resume_result = self.greet(dial, token, seq, **options)
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
        resume_result = self.greet(*args, **options)
        return resume_result.outcome, resume_result.why, resume_result.cursor


def say(session: Session, count: int) -> None:
    """Send some messages to a session."""
    for number in range(count):
        session.offer(encode(number))


async def test_hello_without_token_gets_new_session() -> None:
    """`none`: a client without a token gets a new session, in a shard, which can be looked up by its id."""
    shop = Shop()
    resume_result = shop.greet()
    session = resume_result.session
    assert (resume_result.outcome, resume_result.why, resume_result.cursor) == (NONE, None, 0)
    assert shop.began == [session]
    assert shop.sessions.get(session.connection_id) is session
    assert (session.client_id, session.shard, session.last_attempt) == ("ann", 0, 1)
    assert shop.greet(2).session is not session
    assert len(shop.sessions) == 2


async def test_client_without_missed_messages_resumes_fully() -> None:
    """`full`: the replay may be empty."""
    shop = Shop()
    before, token, _ = shop.connect()
    say(before.session, 3)
    shop.lose(before.session)
    resume_result = shop.greet(2, token, 3)
    assert resume_result == ResumeResult(before.session, FULL, None, 3)
    assert len(before.session.kept) == 0
    assert shop.events.counters.sessions_resumed == 1


async def test_full_resume_replays_exactly_missed_messages() -> None:
    """`full`: the messages after the presented number follow the welcome, including those sent while detached."""
    shop = Shop()
    before, token, _ = shop.connect()
    say(before.session, 2)
    shop.lose(before.session)
    before.session.offer(encode("meanwhile"))
    _, _, connection = shop.connect(2, token, 1)
    assert connection.texts == ["welcome", '{"type":"msg","data":1}', '{"type":"msg","data":"meanwhile"}']
    assert shop.sessions.detached_count == 0


async def test_presented_number_acknowledges_messages() -> None:
    """Messages up to the presented number are removed, and senders that wait for them continue."""
    shop = Shop()
    before, token, _ = shop.connect()
    say(before.session, 3)
    shop.lose(before.session)
    shop.greet(2, token, 2)
    await before.session.requests.until_acknowledged(2)
    assert before.session.first_seq == 3


async def test_unknown_token_is_lost_session() -> None:
    """`lost/unknown`: a session that does not exist, and a secret that is not the session's."""
    shop = Shop()
    session, token, _ = shop.connect()
    for number, bogus in enumerate(("", ".", "nobody.x", f"{session.session.connection_id}.x", token + "x"), 2):
        assert shop.outcome(number, bogus, 5) == (LOST, "unknown", 0)
    assert shop.heard.of("session_lost")[0].fields["why"] == "unknown"
    assert shop.events.counters.sessions_lost == 5
    assert shop.greet(99, token).session is session.session


async def test_expired_session_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """`lost/expired`: after its ttl a session is ended, even if no timer has done it."""
    shop = Shop(session_ttl=10)
    now = [1000.0]
    monkeypatch.setattr(store_module, "monotonic", lambda: now[0])
    before, token, _ = shop.connect()
    shop.lose(before.session)
    now[0] += 10
    resume_result = shop.greet(2, token)
    assert (resume_result.outcome, resume_result.why) == (LOST, "expired")
    assert resume_result.session is not before.session
    assert shop.ended == [before.session]
    shop.sessions.stop()


async def test_token_of_other_client_starts_new_session() -> None:
    """`lost/denied`: a valid token of another principal leads to a new session of the presenter."""
    shop = Shop()
    before, token, _ = shop.connect()
    resume_result = shop.greet(7, token, who="eve")
    assert (resume_result.outcome, resume_result.why, resume_result.session.client_id) == (LOST, "denied", "eve")
    assert before.session.last_attempt == 1
    assert shop.greet(2, token).session is before.session


async def test_late_attempt_with_token_is_stale() -> None:
    """An attempt with a number not above the session's highest is one that its client has abandoned."""
    shop = Shop()
    before, token, connection = shop.connect(3)
    for dial in (1, 2, 3):
        with pytest.raises(StaleAttemptError):
            shop.greet(dial, token)
    assert before.session.connection is connection
    assert shop.greet(4, token).outcome is FULL


async def test_late_attempt_with_consumed_token_is_stale() -> None:
    """The newer attempt may have used the token: the late one is closed, and gets no new session."""
    shop = Shop()
    before, first, _ = shop.connect(1)
    _, second, _ = shop.connect(3, first)
    before.session.present(second.partition(".")[2])
    with pytest.raises(StaleAttemptError):
        shop.greet(2, first)
    assert len(shop.sessions) == 1


async def test_late_attempt_without_token_is_stale() -> None:
    """A first attempt that arrives after the second one is closed, if its client names its instance."""
    shop = Shop()
    resume_result = shop.greet(2, instance="tab-1")
    with pytest.raises(StaleAttemptError):
        shop.greet(1, instance="tab-1")
    assert shop.greet(1, instance="tab-2").outcome is NONE
    assert shop.greet(1, instance="tab-1", who="bob").outcome is NONE
    assert shop.greet(3, instance="tab-1").session is not resume_result.session


async def test_client_instance_is_forgotten_with_its_session() -> None:
    """An ended session makes no later attempt stale."""
    shop = Shop()
    first = shop.greet(2, instance="tab-1").session
    second = shop.greet(3, instance="tab-1").session
    shop.sessions.end(first, local_close(DisconnectReason.COMPLETED))
    with pytest.raises(StaleAttemptError):
        shop.greet(1, instance="tab-1")
    shop.sessions.end(second, local_close(DisconnectReason.COMPLETED))
    assert shop.greet(1, instance="tab-1").outcome is NONE
    assert len(shop.sessions._of_instance) == 1


async def test_lost_welcome_keeps_presented_token_valid() -> None:
    """The token presented last is valid beside the newest one, until that is confirmed."""
    shop = Shop()
    before, first, _ = shop.connect(1)
    assert shop.connect(2, first)[0].outcome is FULL
    assert shop.connect(3, first)[0].outcome is FULL
    _, newest, _ = shop.connect(4, first)
    before.session.confirm()
    assert shop.outcome(5, first)[:2] == (LOST, "unknown")
    assert shop.greet(6, newest).session is before.session


async def test_presented_newest_token_invalidates_older() -> None:
    """When the newest token is presented, the one before it is invalid."""
    shop = Shop()
    _, first, _ = shop.connect(1)
    _, second, _ = shop.connect(2, first)
    shop.connect(3, second)
    assert shop.outcome(4, first)[:2] == (LOST, "unknown")


async def test_token_of_earlier_epoch_is_gap() -> None:
    """`gap/epoch`: numbers from before a rewind may mean other messages, so nothing is replayed."""
    shop = Shop()
    before, token, _ = shop.connect()
    say(before.session, 5)
    shop.lose(before.session)
    before.session.rewind(2)
    say(before.session, 4)
    assert shop.outcome(2, token, 5) == (GAP, "epoch", 7)
    assert shop.greet(3, before.session.new_token(), 7).outcome is FULL


async def test_number_ahead_of_server_is_gap() -> None:
    """`gap/ahead`: a client with a number above the server's has another history."""
    shop = Shop()
    before, token, _ = shop.connect()
    say(before.session, 2)
    assert shop.outcome(2, token, 3) == (GAP, "ahead", 2)


async def test_overflowed_buffer_is_gap_without_replay() -> None:
    """`gap/overflow`: a client that missed more than is stored gets none of it, and a gap."""
    shop = Shop(replay_max_messages=3)
    before, token, _ = shop.connect()
    say(before.session, 5)
    _, newer, connection = shop.connect(2, token, 1)
    assert connection.texts == ["welcome"]
    assert (before.session.head, len(before.session.kept)) == (5, 0)
    told = shop.heard.of("session_gap")[0].fields
    assert (told["why"], told["missed_messages"]) == ("overflow", 4)
    assert shop.events.counters.session_gaps == 1
    assert shop.greet(3, newer, 5).outcome is FULL


async def test_gap_fails_ack_waiters_of_missed_messages() -> None:
    """Waiters for messages in a gap fail, because the client has not received them."""
    shop = Shop(replay_max_messages=1)
    before, token, _ = shop.connect()
    say(before.session, 3)
    got, missed = (asyncio.ensure_future(before.session.requests.until_acknowledged(seq)) for seq in (1, 2))
    await settle()
    assert shop.outcome(2, token, 1) == (GAP, "overflow", 3)
    before.session.acknowledged(3)
    await settle()
    assert got.exception() is None
    assert isinstance(missed.exception(), RequestError)


async def test_client_missing_exactly_stored_messages_resumes_fully() -> None:
    """A client that missed exactly the stored messages gets all of them."""
    shop = Shop(replay_max_messages=3)
    before, token, _ = shop.connect()
    say(before.session, 5)
    resume_result = shop.greet(2, token, 2)
    assert (resume_result.outcome, len(before.session.since(2))) == (FULL, 3)


async def test_expired_messages_are_overflow_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Expired messages are not replayed either."""
    shop = Shop(replay_max_age=10)
    before, token, _ = shop.connect()
    say(before.session, 2)
    later = store_module.monotonic() + 11
    monkeypatch.setattr("fastapi_ws_stabilizer.sessions.replay_buffer.monotonic", lambda: later)
    assert shop.outcome(2, token, 1) == (GAP, "overflow", 2)


async def test_epoch_is_checked_before_numbers() -> None:
    """Of several reasons for a gap, the first in the protocol's order is reported."""
    shop = Shop(replay_max_messages=1)
    before, token, _ = shop.connect()
    say(before.session, 5)
    session = before.session
    assert store_module.replay_gap(session, 1, 99) == "epoch"
    assert store_module.replay_gap(session, 0, 99) == "ahead"
    assert store_module.replay_gap(session, 0, 3) == "overflow"
    assert store_module.replay_gap(session, 0, 4) is None
    assert store_module.replay_gap(session, 0, 5) is None
    assert token


async def test_takeover_moves_session_to_new_connection() -> None:
    """The next connection takes over the session of a half-open one at once; the close of the old one has no effect."""
    shop = Shop()
    before, token, old = shop.connect()
    resume_result = shop.greet(2, token)
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
        shop = Shop(session_ttl=10)
        resume_result, token, connection = shop.connect()
        say(resume_result.session, 2)
        shop.lose(resume_result.session)
        resume_result.session.socket = connection
        assert shop.sessions.detached_of("ann") == [resume_result.session]
        await asyncio.sleep(9.9)
        assert shop.ended == []
        await asyncio.sleep(0.2)
        assert shop.ended == [resume_result.session]
        assert shop.endings == [resume_result.session.ended] == [connection.close_info]
        assert shop.events.counters.messages_discarded == 2
        assert shop.sessions.detached_of("ann") == []
        assert (len(shop.sessions), shop.sessions.detached_count) == (0, 0)
        assert shop.heard.of("session_ended")[0].fields["unacknowledged"] == 2
        assert shop.outcome(2, token)[:2] == (LOST, "unknown")

    in_time(body)


def test_resume_in_time_keeps_session() -> None:
    """Resuming stops the expiry, and detaching again restarts it."""

    async def body() -> None:
        shop = Shop(session_ttl=10)
        resume_result, token, _ = shop.connect()
        shop.lose(resume_result.session)
        await asyncio.sleep(9)
        shop.connect(2, token)
        await asyncio.sleep(60)
        assert shop.ended == []
        shop.lose(resume_result.session)
        await asyncio.sleep(9)
        assert shop.ended == []
        await asyncio.sleep(2)
        assert shop.ended == [resume_result.session]

    in_time(body)


def test_each_session_has_its_own_deadline() -> None:
    """One timer serves all sessions, each at its deadline."""

    async def body() -> None:
        shop = Shop(session_ttl=10)
        sessions = []
        for number in range(3):
            resume_result, _, _ = shop.connect(who=f"client-{number}")
            shop.lose(resume_result.session)
            sessions.append(resume_result.session)
            await asyncio.sleep(3)
        for number in range(3):
            assert shop.ended == sessions[:number]
            await asyncio.sleep(1.5 if number == 0 else 3)
        assert shop.ended == sessions
        assert shop.sessions._timer is None

    in_time(body)


def test_mass_expiry_ends_bounded_batches_per_iteration() -> None:
    """At most `AT_ONCE` sessions end in one iteration, and all of them eventually."""

    async def body() -> None:
        shop = Shop(session_ttl=10)
        for number in range(2 * store_module.AT_ONCE + 1):
            shop.lose(shop.connect(who=str(number))[0].session)
        await asyncio.sleep(10.001)
        assert 0 < len(shop.ended) <= 2 * store_module.AT_ONCE + 1
        await settle()
        assert len(shop.ended) == 2 * store_module.AT_ONCE + 1

    in_time(body)


async def test_oldest_detached_session_is_evicted_with_warning() -> None:
    """Above the limit, the session that was detached first ends with a warning."""
    shop = Shop(max_detached_sessions=2)
    sessions = [shop.connect(who=who)[0].session for who in ("ann", "bob", "cid")]
    for session in sessions:
        shop.lose(session)
    assert shop.ended == [sessions[0]]
    assert shop.sessions.detached_count == 2
    assert [report.fields["client_id"] for report in shop.heard.of("session_evicted")] == ["ann"]
    shop.sessions.stop()


async def test_disabled_reconnect_ends_session_with_connection() -> None:
    """With `enable_reconnect=False` a session ends with its connection."""
    shop = Shop(enable_reconnect=False)
    session = shop.connect()[0].session
    shop.lose(session)
    assert shop.ended == [session]
    assert session.ended is not None
    assert shop.sessions.detached_count == 0


async def test_session_ends_once() -> None:
    """Ending a session again changes nothing, and an ended session is never detached."""
    shop = Shop()
    session = shop.connect()[0].session
    shop.sessions.end(session, local_close(DisconnectReason.APPLICATION))
    shop.sessions.end(session, local_close(DisconnectReason.COMPLETED))
    shop.sessions.on_detached(session)
    assert shop.ended == [session]
    assert shop.sessions.detached_count == 0


async def test_detached_session_can_be_ended() -> None:
    """A detached session can be ended, and its client gets `lost` when it tries to resume."""
    shop = Shop()
    resume_result, token, _ = shop.connect()
    shop.lose(resume_result.session)
    assert resume_result.session.close(DisconnectReason.APPLICATION, code=4410)
    assert shop.ended == [resume_result.session]
    assert resume_result.session.ended is not None
    assert resume_result.session.ended.code == 4410
    assert shop.outcome(2, token)[:2] == (LOST, "unknown")
    shop.sessions.stop()


async def test_shutdown_ends_all_sessions() -> None:
    """A shutdown ends every session, attached or detached, and leaves no timer."""
    shop = Shop()
    here, away = shop.connect(who="ann")[0].session, shop.connect(who="bob")[0].session
    shop.lose(away)
    assert shop.sessions.stop() == [here, away]
    assert shop.ended == [here, away]
    assert (len(shop.sessions), shop.sessions.detached_count, shop.sessions._timer) == (0, 0, None)
    assert shop.sessions.stop() == []


async def test_session_events_contain_no_token() -> None:
    """Events about sessions contain no secret."""
    shop = Shop(replay_max_messages=1)
    resume_result, token, _ = shop.connect()
    say(resume_result.session, 5)
    shop.greet(2, token, 1)
    shop.greet(3, "x." + token, 1)
    shop.sessions.stop()
    secret = token.partition(".")[2]
    assert shop.heard.events == ["session_gap", "session_lost", "session_ended", "session_ended"]
    assert all(secret not in repr(report) for report in shop.heard.all)
    assert secret not in repr(resume_result)
