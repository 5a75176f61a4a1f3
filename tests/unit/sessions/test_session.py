"""Tests of one session: its messages, its tokens, and its connection."""

from __future__ import annotations

import hmac
import json

import pytest

from fastapi_ws_stabilizer.close_codes import CloseInfo, DisconnectReason, local_close
from fastapi_ws_stabilizer.errors import MessageEncodeError, SessionEndedError
from fastapi_ws_stabilizer.events import Counters
from fastapi_ws_stabilizer.queueing import EnqueueResult
from fastapi_ws_stabilizer.sessions.replay_buffer import ReplayLimits
from fastapi_ws_stabilizer.sessions.session import Session
from fastapi_ws_stabilizer.wire.encoded import EncodedMessage, encode
from tests.support.fake_attachment import FakeAttachment


class SessionHarness:
    """A session, with a record of its callbacks."""

    def __init__(self) -> None:
        self.ended: list[tuple[Session, CloseInfo]] = []
        self.counters = Counters()
        limits = ReplayLimits(10, 10**6, 60.0)
        self.session = Session("ann", 0, limits, self.counters, lambda *args: self.ended.append(args))

    def secret(self) -> str:
        """Return a new token, without the session's id."""
        return self.session.new_token().partition(".")[2]


def stored(session: Session, seq: int = 0) -> list[object]:
    """Return the data of the replay buffer after a number."""
    return [json.loads(frame.payload)["data"] for frame in session.buffer.since(seq)]


WELCOME = EncodedMessage("welcome")


def test_sent_message_is_numbered_stored_and_queued() -> None:
    """A message for a connected client is numbered, stored and queued, as one frame for all v1 clients."""
    harness, connection = SessionHarness(), FakeAttachment()
    session = harness.session
    session.attach(connection, 0, WELCOME)
    frame = encode({"n": 1})
    assert session.outbox.offer(frame) is EnqueueResult.QUEUED
    assert connection.texts == ["welcome", '{"type":"msg","data":{"n":1}}']
    assert session.buffer.since(0)[0] is connection.frames[1] is frame.enveloped


def test_message_for_detached_session_is_numbered_and_stored() -> None:
    """A message for a detached client is numbered and stored."""
    session = SessionHarness().session
    assert session.outbox.offer(encode("hello")) is EnqueueResult.QUEUED
    assert session.head == 1
    assert stored(session) == ["hello"]
    assert session.connection is None


def test_new_connection_gets_welcome_then_replay_then_live() -> None:
    """The welcome comes first, then the messages after the client's number, then new ones."""
    session, connection = SessionHarness().session, FakeAttachment()
    for number in range(3):
        session.outbox.offer(encode(number))
    assert session.attach(connection, 1, WELCOME) is None
    session.outbox.offer(encode(3))
    assert connection.texts[0] == "welcome"
    assert [json.loads(text or "")["data"] for text in connection.texts[1:]] == [1, 2, 3]
    assert session.socket == connection.socket


def test_volatile_message_is_neither_stored_nor_numbered() -> None:
    """A connected client gets a volatile message, and a detached one misses it."""
    harness, connection = SessionHarness(), FakeAttachment()
    session = harness.session
    assert session.outbox.offer(encode(1, volatile=True)) is EnqueueResult.SKIPPED
    session.attach(connection, 0, WELCOME)
    assert session.outbox.offer(encode(1, volatile=True)) is EnqueueResult.QUEUED
    assert connection.texts[1] == '{"type":"msg","volatile":true,"data":1}'
    connection.room = False
    assert session.outbox.offer(encode(1, volatile=True)) is EnqueueResult.DROPPED
    assert harness.counters.messages_dropped == 1
    assert (session.head, len(session.buffer.entries)) == (0, 0)


def test_sequenced_message_refused_by_outbox_is_stored() -> None:
    """A client that is too slow loses its connection, but no message: the replay buffer has it."""
    session, connection = SessionHarness().session, FakeAttachment(calm=False, room=False)
    session.attach(connection, 0, WELCOME)
    assert session.outbox.offer(encode(1)) is EnqueueResult.SLOW
    assert connection.close_info is not None
    assert connection.close_info.cause is DisconnectReason.SLOW_CONSUMER
    assert stored(session) == [1]


def test_message_refused_by_closing_connection_is_stored() -> None:
    """A message during a close for another reason is stored for the next connection."""
    session, connection = SessionHarness().session, FakeAttachment(calm=False)
    session.attach(connection, 0, WELCOME)
    connection.verdict = EnqueueResult.CLOSED
    connection.close(DisconnectReason.APPLICATION)
    assert session.outbox.offer(encode(1)) is EnqueueResult.QUEUED
    assert stored(session) == [1]


def test_waiting_sender_is_numbered_before_later_message() -> None:
    """Queue and replay buffer have the same order, even if making room admits a waiting sender."""
    session, connection = SessionHarness().session, FakeAttachment(calm=False)
    session.attach(connection, 0, WELCOME)

    def let_in() -> None:
        frame = encode("waited").enveloped or encode("waited")
        connection.frames.append(frame)
        session.buffer.append(frame)

    connection.before_enqueue = let_in
    connection.verdict = EnqueueResult.BACKPRESSURE
    assert session.outbox.offer(encode("new")) is EnqueueResult.BACKPRESSURE
    assert [frame.text for frame in session.buffer.since(0)] == connection.texts[1:]


async def test_waiting_send_is_numbered_when_queued() -> None:
    """A message of the endpoint gets its number at the time at which it is queued."""
    session, connection = SessionHarness().session, FakeAttachment()
    session.attach(connection, 0, WELCOME)
    assert await session.outbox.put_wait(connection.outbox, encode("a")) == 1
    assert session.outbox.try_send(connection.outbox, encode("b"))
    assert await session.outbox.put_wait(connection.outbox, encode("v", volatile=True)) == 0
    assert session.head == 2
    connection.room = False
    assert await session.outbox.put_wait(connection.outbox, encode("c")) is None
    assert session.head == 2


def test_only_attached_connection_sends_on_fast_path() -> None:
    """A connection that has lost its session does not number messages of the next one."""
    session, old, new = SessionHarness().session, FakeAttachment(), FakeAttachment()
    session.attach(old, 0, WELCOME)
    assert session.attach(new, 0, WELCOME) is old
    assert not session.outbox.try_send(old, encode("late"))
    assert session.head == 0
    assert not session.outbox.try_send(new, encode("v", volatile=True))


def test_close_of_old_connection_detaches_nothing() -> None:
    """Only the attached connection can detach the session; an older one is fenced."""
    session, old, new = SessionHarness().session, FakeAttachment(), FakeAttachment()
    session.attach(old, 0, WELCOME)
    session.attach(new, 0, WELCOME)
    assert not session.detach(old)
    assert session.connection is new
    assert session.detach(new)
    assert session.connection is None


def test_session_is_backpressured_with_its_connection() -> None:
    """A session is backpressured if its connection is; without a connection it never is."""
    session, connection = SessionHarness().session, FakeAttachment()
    assert not session.outbox.is_backpressured()
    session.attach(connection, 0, WELCOME)
    connection.pressed = True
    assert session.outbox.is_backpressured()
    assert session.outbox.owner is session


# ── tokens ──


def test_newest_token_is_valid() -> None:
    """The token of the last welcome is valid, and records its epoch."""
    harness = SessionHarness()
    token = harness.session.new_token()
    assert token.startswith(f"{harness.session.connection_id}.")
    assert harness.session.knows(token.partition(".")[2])
    assert harness.session.present(token.partition(".")[2]) == 0


@pytest.mark.parametrize("secret", ["", "x", "🦊", "\ud800"])
def test_unissued_token_is_invalid(secret: str) -> None:
    """Any other secret is invalid, also before the first token was issued."""
    harness = SessionHarness()
    assert harness.session.present(secret) is None
    harness.secret()
    assert harness.session.present(secret) is None
    assert not harness.session.knows(secret)


def test_two_tokens_are_valid_until_newer_is_confirmed() -> None:
    """The welcome with a new token may be lost, so the token that was presented last stays valid beside it."""
    harness = SessionHarness()
    session = harness.session
    first = harness.secret()
    assert session.present(first) == 0
    second = harness.secret()
    assert session.knows(first)
    assert session.knows(second)
    session.confirm()  # a frame after the hello: the welcome has arrived
    assert not session.knows(first)
    assert session.present(first) is None
    assert session.knows(second)


def test_token_check_always_compares_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of comparisons does not reveal which token matched, or whether one did."""
    harness = SessionHarness()
    session = harness.session
    first = harness.secret()
    session.present(first)
    second = harness.secret()
    compared: list[object] = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda *both: compared.append(both) or real(*both))
    for secret in ("wrong", first, second):
        for check in (session.knows, session.present):
            compared.clear()
            check(secret)
            assert len(compared) == 2


def test_repeatedly_lost_welcome_keeps_token_valid() -> None:
    """A client that never gets a welcome can resume with the same token forever."""
    harness = SessionHarness()
    token = harness.secret()
    for _ in range(5):
        assert harness.session.present(token) == 0
        harness.secret()
    assert harness.session.present(token) == 0


def test_presenting_newest_token_invalidates_older() -> None:
    """Presenting the newest token confirms it, because the client has received its welcome."""
    harness = SessionHarness()
    first = harness.secret()
    harness.session.present(first)
    second = harness.secret()
    assert harness.session.present(second) == 0
    assert harness.session.present(first) is None


def test_unconfirmed_token_is_replaced_by_next() -> None:
    """Two tokens are valid: the one presented last, and the newest one."""
    harness = SessionHarness()
    token = harness.secret()
    harness.session.present(token)
    lost, newest = harness.secret(), harness.secret()
    assert not harness.session.knows(lost)
    assert harness.session.knows(newest)
    assert harness.session.knows(token)


def test_token_check_confirms_nothing() -> None:
    """Checking a token has no side effect."""
    harness = SessionHarness()
    first = harness.secret()
    harness.session.present(first)
    second = harness.secret()
    assert harness.session.knows(second)
    assert harness.session.knows(first)


def test_token_records_its_issue_epoch() -> None:
    """A token from before a rewind has an older epoch."""
    harness = SessionHarness()
    for number in range(5):
        harness.session.outbox.offer(encode(number))
    secret = harness.secret()
    harness.session.rewind(2)
    assert harness.session.epoch == 1
    assert harness.session.head == 3
    assert harness.session.present(secret) == 0
    assert harness.session.present(harness.secret()) == 1


def test_session_repr_contains_no_token() -> None:
    """The repr of a session shows its id, its client and its state, and no token."""
    harness = SessionHarness()
    secret = harness.secret()
    assert repr(harness.session) == f"<Session {harness.session.connection_id} of 'ann' detached>"
    harness.session.attach(FakeAttachment(), 0, WELCOME)
    assert "attached" in repr(harness.session)
    harness.session.finish(local_close(DisconnectReason.COMPLETED))
    assert "ended" in repr(harness.session)
    assert secret not in repr(harness.session)


# ── acknowledgements and replies ──


def test_ack_forgets_only_sent_messages() -> None:
    """Acknowledged messages are removed; messages that were not sent cannot be acknowledged."""
    session = SessionHarness().session
    for number in range(3):
        session.outbox.offer(encode(number))
    assert session.acknowledge(2)
    assert stored(session, 2) == [2]
    assert not session.acknowledge(4)
    assert session.acknowledge(3)


async def test_reply_is_numbered_message() -> None:
    """A reply is numbered like a message, and survives a reconnect."""
    session, connection = SessionHarness().session, FakeAttachment()
    session.attach(connection, 0, WELCOME)
    session.reply("c1", {"sum": 3})
    session.reply("c2", error={"code": "no", "message": "never"})
    session.reply("c3", b"\x00\x01")
    assert connection.texts[1] == '{"type":"reply","re":"c1","data":{"sum":3}}'
    assert json.loads(connection.texts[2] or "") == {
        "type": "reply",
        "re": "c2",
        "error": {"code": "no", "message": "never"},
        "data": None,
    }
    assert connection.frames[3].payload.endswith(b"\x00\x01")
    assert session.head == 3


async def test_unencodable_reply_raises_without_numbering() -> None:
    """An answer that cannot be encoded raises at the caller, and gets no number."""
    session = SessionHarness().session
    with pytest.raises(MessageEncodeError, match="object cannot be sent as JSON"):
        session.reply("c1", object())
    assert session.head == 0


# ── the end of a session ──


def test_ending_attached_session_closes_its_connection() -> None:
    """Ending an attached session closes its connection, which determines what happens to the session."""
    harness, connection = SessionHarness(), FakeAttachment()
    harness.session.attach(connection, 0, WELCOME)
    assert harness.session.close(DisconnectReason.APPLICATION, code=4410, reason="kicked")
    assert connection.close_info == local_close(DisconnectReason.APPLICATION, code=4410, reason="kicked")
    assert harness.ended == []


def test_ending_detached_session_ends_it_once() -> None:
    """A detached session ends at once, and only once."""
    harness = SessionHarness()
    assert harness.session.close(DisconnectReason.APPLICATION, code=4410)
    assert [how.code for _, how in harness.ended] == [4410]
    harness.session.finish(harness.ended[0][1])
    assert not harness.session.close(DisconnectReason.APPLICATION)
    assert harness.session.close_info is harness.ended[0][1]


async def test_ended_session_rejects_messages_and_fails_waiters() -> None:
    """After the end the replay buffer is empty, new messages are rejected, and all waiters fail."""
    session = SessionHarness().session
    session.outbox.offer(encode(1))
    session.outbox.offer(encode(2))
    _, answer = session.requests.open()
    assert session.finish(local_close(DisconnectReason.COMPLETED)) == 2
    assert session.outbox.offer(encode(3)) is EnqueueResult.CLOSED
    assert session.outbox.offer(encode(3, volatile=True)) is EnqueueResult.CLOSED
    assert (len(session.buffer.entries), session.buffer.held_bytes, session.head) == (0, 0, 2)
    with pytest.raises(SessionEndedError):
        await answer
