"""Tests of the session of a client."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fastapi_ws_stabilizer.client.errors import RefusedError, SessionLostError, UnreadableFrameError
from fastapi_ws_stabilizer.client.events import ClientEvents, Gap
from fastapi_ws_stabilizer.client.send_buffer import NO_LIMIT, PendingMessage, SendBuffer
from fastapi_ws_stabilizer.client.session import ClientSession, Welcome
from fastapi_ws_stabilizer.tasks import TaskSet
from fastapi_ws_stabilizer.wire.v1.frames import ProtocolError

WELCOME = {
    "type": "welcome",
    "resume": "none",
    "session": "s",
    "token": "t",
    "seq": 0,
    "ack": 0,
    "ping": 25_000,
    "timeout": 20_000,
}


def welcome(**fields: Any) -> Welcome:
    """Return a welcome of the server."""
    return Welcome.from_frame({**WELCOME, **fields})


class Desk:
    """A session, and what it reports."""

    def __init__(self, *, replays: bool = False) -> None:
        tasks = TaskSet(lambda *_: None)
        events = ClientEvents(tasks)
        self.gaps: list[Gap] = []
        self.errors: list[Exception] = []
        events.add("gap", self.gaps.append)
        events.add("error", self.errors.append)
        self.session = ClientSession(tasks, events, SendBuffer(100, 10**6, "reject"), replays=replays)

    def hello(self, credential: str | None = None, *, deflates: bool = False) -> dict[str, Any]:
        """Return the next hello."""
        hello: dict[str, Any] = json.loads(self.session.hello(credential, deflates=deflates))
        return hello


async def test_hello_asks_for_session_once_it_has_token() -> None:
    """The first hello asks for no session, later ones resume it, and each has its number and the same instance."""
    desk = Desk()
    first = desk.hello()
    assert first == {"type": "hello", "v": 1, "n": 1, "client": desk.session.instance_id, "caps": ["retry"]}
    desk.session.attach(welcome(seq=5))
    again = desk.hello("secret", deflates=True)
    assert again["resume"] == {"token": "t", "seq": 5}
    assert (again["n"], again["client"], again["auth"]) == (2, first["client"], "secret")
    assert again["caps"] == ["retry", "deflate-raw"]
    assert desk.session.attempts == 2


def test_welcome_reads_durations_in_seconds() -> None:
    """The durations of the frame are in milliseconds, and fields of newer servers are ignored."""
    read = welcome(max=4096, caps=["deflate-raw", "later"], why="expired", later=1)
    assert (read.ping_interval, read.ping_timeout) == (25.0, 20.0)
    assert (read.max_frame, read.deflates, read.why) == (4096, True, "expired")
    assert (welcome().max_frame, welcome(caps="deflate-raw").deflates) == (None, False)


@pytest.mark.parametrize(
    "fields",
    [{"session": None}, {"token": "x" * 513}, {"resume": "partial"}, {"seq": -1}, {"ping": "25"}, {"max": 0}],
    ids=str,
)
def test_malformed_welcome_is_protocol_error(fields: dict[str, Any]) -> None:
    """A welcome with a missing or invalid field raises."""
    with pytest.raises(ProtocolError):
        welcome(**fields)


@pytest.mark.parametrize(
    ("fields", "outcome", "gap"),
    [
        ({"resume": "full", "seq": 5}, "full", None),
        ({"resume": "gap", "seq": 9, "why": "overflow"}, "gap", Gap(False, "overflow", 6, 9)),
        ({"resume": "lost", "why": "unknown"}, "lost", Gap(True, "unknown", 6, None)),
        ({"resume": "none"}, "lost", Gap(True, "given_up", 6, None)),
    ],
    ids=["full", "gap", "lost", "abandoned"],
)
async def test_attach_reports_what_is_missing(fields: dict[str, Any], outcome: str, gap: Gap | None) -> None:
    """A resume reports the gap by its numbers; a new session in place of an abandoned one counts as lost."""
    desk = Desk()
    assert desk.session.attach(welcome(seq=5)) == "none"
    assert desk.session.attach(welcome(**{"session": "new", **fields})) == outcome
    assert desk.gaps == ([] if gap is None else [gap])
    assert (desk.session.id, desk.session.last_seq) == ("new", fields.get("seq", 0))


@pytest.mark.parametrize("replays", [False, True])
async def test_lost_session_fails_or_replays_sent_messages(replays: bool) -> None:
    """Sent messages of a lost session fail, or wait for the new session with `replay_on_lost`."""
    desk = Desk(replays=replays)
    desk.session.attach(welcome())
    message = PendingMessage("msg", 1, {})
    desk.session.buffer.add(message)
    desk.session.buffer.pop_next()
    desk.session.attach(welcome(resume="lost"))
    assert (len(desk.session.buffer), message.done.done()) == (int(replays), not replays)
    if not replays:
        assert isinstance(message.done.exception(), SessionLostError)


async def test_attach_keeps_frame_limit_of_earlier_server() -> None:
    """Without a limit in the welcome, the limit of the last one stays."""
    desk = Desk()
    assert desk.session.buffer.max_frame == NO_LIMIT
    desk.session.attach(welcome(max=4096))
    desk.session.attach(welcome(resume="full"))
    assert desk.session.buffer.max_frame == 4096


async def test_unreadable_frames_are_counted_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """Each unreadable frame reaches `on_error`, but only the first is a warning."""
    desk = Desk()
    for number in range(3):
        desk.session.on_unreadable(f"bad frame {number}")
    assert desk.session.unreadable_frames == 3
    assert [type(error) for error in desk.errors] == [UnreadableFrameError] * 3
    assert [record.levelname for record in caplog.records] == ["WARNING"]


async def test_rejected_message_gets_its_event() -> None:
    """The error of a rejected message has its event and fails its future."""
    desk = Desk()
    desk.session.attach(welcome())
    message = PendingMessage("msg", 1, {"event": "chat"})
    desk.session.buffer.add(message)
    desk.session.buffer.pop_next()
    for error in (RefusedError("no", "never", 1), RefusedError("no", "never")):
        desk.session.on_rejected(error)
    assert [getattr(error, "event", None) for error in desk.errors] == ["chat", None]
    assert message.done.exception() is desk.errors[0]
