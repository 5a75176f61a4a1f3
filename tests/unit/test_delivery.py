"""Tests of rooms, presence and broadcasts through the manager."""

from __future__ import annotations

from typing import Any

import pytest

from fastapi_ws_stabilizer import Presence, Room, RoomLimitError, SlowClient, SocketClosed
from tests.unit.fake_websocket import FakeServer, eventually, settle


async def connected(manager: Any, client_id: str) -> tuple[FakeServer, Any]:
    server = FakeServer()
    return server, await manager.connect(client_id, await server.accepted())


async def test_a_room_gets_what_is_sent_to_it_and_nobody_else(manager_with: Any) -> None:
    """Members of several rooms get one copy, excluded ones and others none."""
    manager, _ = manager_with()
    (a, ann), (b, bob), (c, cleo), (d, _) = [await connected(manager, name) for name in ("ann", "bob", "cleo", "dan")]
    await ann.join("red")
    await ann.join("blue")
    await bob.join("blue")
    await cleo.join("red")
    result = await manager.broadcast("both", room=["red", "blue"], exclude=cleo)
    assert (result.total, result.succeeded) == (2, 2)
    await manager.room("red").send("red only", exclude="ann")
    await manager.broadcast("all", exclude=["ann", bob], exclude_client="dan")
    await settle()
    assert (a.data, b.data, c.data, d.data) == (["both"], ["both"], ["red only", "all"], [])


async def test_rooms_vanish_when_their_last_member_is_gone(manager_with: Any) -> None:
    """By leaving, by closing the room, and by the end of the connection."""
    manager, _ = manager_with()
    _, ann = await connected(manager, "ann")
    server, bob = await connected(manager, "bob")
    for room in ("one", "two", "three"):
        await ann.join(room)
    await bob.join("three")
    assert manager.get_rooms() == ["one", "two", "three"]
    assert await ann.leave("one")
    assert not await ann.leave("one")
    assert manager.room("two").close() == 1
    assert ann.rooms == ("three",)
    room = manager.room("three")
    assert (len(room), room.members, "bob" in room, ann in room, bool(room)) == (2, [ann, bob], True, True, True)
    assert room.disconnect(4403, "bye") == 2
    assert manager.get_rooms() == []
    assert not room
    await eventually(lambda: server.close_frames == [(4403, "bye")])
    with pytest.raises(SocketClosed):
        await ann.join("one")
    assert "three" in repr(room)


async def test_the_number_of_rooms_is_limited(manager_with: Any) -> None:
    """max_rooms_per_connection refuses one more, and says what to do."""
    manager, _ = manager_with(max_rooms_per_connection=1)
    _, ann = await connected(manager, "ann")
    await ann.join("one")
    with pytest.raises(RoomLimitError, match="max_rooms_per_connection"):
        await ann.join("two")
    with pytest.raises(ValueError, match="room's name"):
        manager.room("")


async def test_two_connections_of_a_client_are_one_person(manager_with: Any) -> None:
    """on_join comes with the first, on_leave with the last, and join gives a snapshot of who is there."""
    manager, _ = manager_with(on_duplicate="allow")
    told: list[tuple[str, str, str]] = []

    @manager.on_join
    async def joined(room: Room, who: Presence) -> None:
        told.append(("join", room.name, who.client_id))

    @manager.on_leave
    async def left(room: Room, who: Presence) -> None:
        told.append(("leave", room.name, who.client_id))

    _, first = await connected(manager, "ann")
    _, second = await connected(manager, "ann")
    await first.join("lobby", {"name": "Ann"})
    here = await second.join("lobby")
    assert [(who.client_id, who.connections, who.metadata["name"]) for who in here] == [("ann", 2, "Ann")]
    await first.leave("lobby")
    await settle()
    assert told == [("join", "lobby", "ann")]
    assert manager.room("lobby").describe("ann", name="Anna")
    assert manager.room("lobby").presence[0].metadata == {"name": "Anna"}
    await second.leave("lobby")
    await eventually(lambda: told[1:] == [("leave", "lobby", "ann")])
    assert manager.room("lobby").clients == []


@pytest.mark.parametrize(("code", "stays"), [(1001, True), (1006, True), (1000, False)])
async def test_a_reload_does_not_flicker(manager_with: Any, code: int, stays: bool) -> None:
    """Who goes without a goodbye is present for presence_grace; who says it is gone at once."""
    manager, _ = manager_with(presence_grace=60)
    told: list[str] = []
    manager.on_leave(lambda room, who: told.append(who.client_id))
    server, ann = await connected(manager, "ann")
    await ann.join("lobby")
    server.feed_disconnect(code)
    await ann.wait_closed()
    assert manager.room("lobby").members == []
    assert manager.room("lobby").clients == (["ann"] if stays else [])
    _, again = await connected(manager, "ann")
    await again.join("lobby")
    await settle()
    assert manager.room("lobby").clients == ["ann"]


async def test_a_hook_that_fails_is_reported_with_its_room(manager_with: Any) -> None:
    """A bug in on_join hurts nobody."""
    manager, heard = manager_with()

    @manager.on_join
    async def joined(room: Room) -> None:
        raise ValueError(room.name)

    _, ann = await connected(manager, "ann")
    await ann.join("lobby")
    await eventually(lambda: heard.of("join_hook_failed"))
    assert heard.of("join_hook_failed")[0].facts == {"room": "lobby"}


async def test_the_slow_hook_gets_the_socket_and_how(manager_with: Any) -> None:
    """on_slow is told of each degree, and nobody waits for it."""
    manager, _ = manager_with(outbox_max_messages=1)
    told: list[tuple[str, SlowClient]] = []

    @manager.on_slow
    async def slow(ws: Any, how: SlowClient) -> None:
        told.append((ws.client_id, how))

    server, _ = await connected(manager, "ann")
    server.block()
    await manager.send_to_client("ann", "stuck")
    await server.until(lambda: len(server.offered) == 2)
    assert [await manager.send_to_client("ann", text) for text in "ab"] == [True, False]
    await eventually(lambda: ("ann", SlowClient.DISCONNECTED) in told)
    server.release()


def test_the_options_for_uvicorn_go_with_the_managers(manager_with: Any) -> None:
    """Protocol class, size, pings, compression, and a bound to the shutdown."""
    manager, _ = manager_with(compression="none", max_message_size=1000, heartbeat_interval=7, heartbeat_timeout=8)
    assert manager.uvicorn_options() == {
        "ws": "fastapi_ws_stabilizer.servers.uvicorn:StableWebSocketProtocol",
        "ws_max_size": 1000,
        "ws_ping_interval": 7,
        "ws_ping_timeout": 8,
        "ws_per_message_deflate": False,
        "timeout_graceful_shutdown": 30,
    }


async def test_bad_metadata_leaves_nobody_half_in(manager_with: Any) -> None:
    """What is no mapping is refused before anything has changed; so is an audience that is none."""
    manager, _ = manager_with()
    _, ann = await connected(manager, "ann")
    with pytest.raises(TypeError, match="mapping"):
        await ann.join("lobby", ["no", "mapping"])
    assert ann.rooms == ()
    assert manager.get_rooms() == []
    with pytest.raises(TypeError, match="client ids and sockets"):
        await manager.broadcast("x", exclude=7)


async def test_a_roster_is_made_when_it_is_looked_at(manager_with: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A join that nobody looks at costs no snapshot, however many are there; one that is looked at stays as it was."""
    manager, _ = manager_with()
    await manager.start()
    board = manager._serving.delivery.presence
    looks: list[str] = []
    present = board.present
    monkeypatch.setattr(type(board), "present", lambda self, room: looks.append(room) or present(room))
    rosters = [await (await connected(manager, f"c{number}"))[1].join("lobby") for number in range(50)]
    assert looks == []
    assert [who.client_id for who in rosters[3][:2]] == ["c0", "c1"]
    await (await connected(manager, "late"))[1].join("lobby")
    assert len(rosters[3]) == 50
    assert rosters[3][0].client_id in repr(rosters[3])
    assert looks == ["lobby"]
