"""Tests of handover between the connections of a session, and of idempotency keys across sessions."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from fastapi_ws_stabilizer.socket import StableSocket
from tests.support.fake_link import soon, virtually
from tests.support.stage import Peer, Stage

Reader = Callable[[Stage, StableSocket], Awaitable[None]]


# ── handover between connections ──


async def run(stage: Stage, ws: StableSocket) -> None:
    """Read with the default `run()`."""
    await ws.run()


async def run_three(stage: Stage, ws: StableSocket) -> None:
    """Handle three messages concurrently."""
    await ws.run(concurrency=3)


async def own_loop(stage: Stage, ws: StableSocket) -> None:
    """Read messages in the endpoint's own loop."""
    async for text in ws:
        if text == "in hand":
            await stage.gate.wait()
        stage.notes.append(text)


readers = pytest.mark.parametrize("reader", [run, run_three, own_loop])


@readers
@pytest.mark.parametrize("half_open", [False, True], ids=["lost", "half-open"])
@virtually
async def test_resumed_endpoint_waits_for_previous_endpoint(reader: Reader, half_open: bool) -> None:
    """The resumed endpoint begins after the old one has handled its current message and its on_disconnect has run."""
    async with Stage() as stage:
        stage.endpoint = lambda ws: reader(stage, ws)
        peer = Peer(stage)
        line = await peer.dial()
        await line.message("wait", "in hand")
        if not half_open:
            await line.leaves()
        new = await peer.dial()
        await new.message("note", "new", first=2)
        await asyncio.sleep(5)
        assert (new.outcome, new.socket, stage.notes) == ("full", None, [])
        assert "resume ann full" not in stage.events
        stage.gate.set()
        await soon()
        assert stage.notes == ["in hand", "new"]
        cause = "replaced" if half_open else "network_lost"
        assert stage.events == ["connect ann", f"disconnect ann {cause}", "resume ann full"]


@readers
@virtually
async def test_resume_hook_waits_for_previous_disconnect_hook(reader: Reader) -> None:
    """on_resume is called after on_disconnect of the old connection has returned."""
    async with Stage() as stage:
        stage.endpoint = lambda ws: reader(stage, ws)

        @stage.manager.on_disconnect
        async def slow(ws: StableSocket) -> None:
            await stage.gate.wait()
            stage.events.append("through")

        peer = Peer(stage)
        await (await peer.dial()).leaves()
        await peer.dial()
        await asyncio.sleep(5)
        assert stage.events == ["connect ann", "disconnect ann network_lost"]
        stage.gate.set()
        await soon()
        assert stage.events[2:] == ["through", "resume ann full"]


@pytest.mark.parametrize("reader", [run, own_loop])
@pytest.mark.parametrize("half_open", [False, True], ids=["lost", "half-open"])
@virtually
async def test_unread_messages_are_read_by_next_connection_in_order(reader: Reader, half_open: bool) -> None:
    """Messages that are accepted but unread are read once, in order, before messages of the new connection."""
    async with Stage() as stage:
        stage.endpoint = lambda ws: reader(stage, ws)
        peer = Peer(stage)
        line = await peer.dial()
        await line.message("wait", "in hand")
        await line.message("note", *range(2, 12), first=2)
        if not half_open:
            await line.leaves()
        new = await peer.dial()
        assert new.welcome["ack"] == 11
        await new.message("note", *range(11, 21), first=11)
        stage.gate.set()
        await soon()
        texts = [1 if note == "in hand" else int(note) for note in stage.notes]
        assert texts == list(range(1, 21))


@virtually
async def test_unread_messages_of_concurrent_run_are_handled_once() -> None:
    """With several messages in progress, no other message is lost or handled twice."""
    async with Stage() as stage:
        stage.endpoint = lambda ws: ws.run(concurrency=3)
        peer = Peer(stage)
        line = await peer.dial()
        await line.message("wait", 1, 2, 3)
        await line.message("note", *range(4, 12), first=4)
        await line.leaves()
        new = await peer.dial()
        await new.message("note", *range(12, 21), first=12)
        assert stage.notes == []
        stage.gate.set()
        await soon()
        assert sorted(stage.notes) == list(range(1, 21))
        assert [note for note in stage.notes if note > 3] == list(range(4, 21))


@virtually
async def test_unread_messages_are_discarded_at_session_end() -> None:
    """Unread messages are counted as discarded when the session ends, and no handler reads them."""
    async with Stage(session_ttl=20, disconnect_grace=1) as stage:
        line = await Peer(stage).dial()
        await line.message("wait", "in hand")
        await line.message("note", "a", "b", first=2)
        await line.leaves()
        await asyncio.sleep(30)
        assert stage.notes == []
        assert stage.manager.counters.messages_discarded == 2


@virtually
async def test_resumed_endpoint_waits_at_most_disconnect_grace() -> None:
    """A handler that runs longer than disconnect_grace is cancelled, and the resumed endpoint begins."""
    async with Stage(disconnect_grace=2) as stage:
        peer = Peer(stage)
        line = await peer.dial()
        await line.message("wait", "in hand")
        await line.leaves()
        new = await peer.dial()
        await asyncio.sleep(10)
        await new.message("note", "new", first=2)
        assert stage.notes == ["new"]
        assert stage.events == ["connect ann", "disconnect ann network_lost", "resume ann full"]


@virtually
async def test_user_data_and_rooms_belong_to_session() -> None:
    """User data and rooms are the same in the next connection and end with the session."""
    async with Stage() as stage:
        peer = Peer(stage)
        line = await peer.dial()
        stage.socket().user_data["orders"] = 3
        await stage.socket().join("lobby")
        await line.leaves()
        line = await peer.dial()
        assert (stage.socket().user_data, stage.socket().rooms) == ({"orders": 3}, ("lobby",))
        await line.leaves(1000)
        await peer.dial()
        assert (stage.socket().user_data, stage.socket().rooms) == ({}, ())


# ── idempotency keys ──


@virtually
async def test_unread_message_with_key_is_handled_in_new_session() -> None:
    """A message that was accepted but never read is handled when it is sent again in a new session."""
    async with Stage(session_ttl=20, disconnect_grace=1) as stage:
        line = await Peer(stage).dial()
        await line.message("wait", "in hand")
        await line.message("note", "unread", first=2, key="k")
        await line.leaves()
        await asyncio.sleep(30)
        line = await Peer(stage).dial()
        await line.message("note", "again", "twice", key="k")
        assert stage.notes == ["again"]


@virtually
async def test_duplicate_request_gets_error_when_first_one_fails() -> None:
    """A second request with the key of a request in progress gets an error if that request fails."""
    async with Stage(on_duplicate="allow") as stage:

        @stage.manager.on_message("fail")
        async def fail(ws: StableSocket, data: str) -> None:
            await stage.gate.wait()
            raise RuntimeError

        first, second = await Peer(stage).dial(), await Peer(stage).dial()
        await first.message("fail", "x", key="k", id="c1")
        await second.message("fail", "x", key="k", id="c2")
        assert second.of("reply") == []
        stage.gate.set()
        await soon()
        assert [(reply["re"], reply["error"]["code"]) for reply in second.of("reply")] == [("c2", "not_handled")]


@virtually
async def test_duplicate_request_gets_first_answer() -> None:
    """A repeated request with the key of a handled one gets the stored answer, in a new session too."""
    async with Stage() as stage:
        line = await Peer(stage).dial()
        await line.message("echo", "once", key="k", id="c1")
        await line.leaves(1000)
        line = await Peer(stage).dial()
        await line.message("echo", "twice", key="k", id="c7")
        assert [(reply["re"], reply["data"]) for reply in line.of("reply")] == [("c7", "once")]
        assert stage.notes == ["once"]
