"""Tests of rooms, presence and broadcasts through the manager."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from fastapi_ws_stabilizer import Presence, Room, RoomLimitError, SlowConsumer, SocketClosed
from fastapi_ws_stabilizer import scheduling as scheduling_module
from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.hub import presence as presence_module
from fastapi_ws_stabilizer.hub.broadcast import BroadcastResult
from fastapi_ws_stabilizer.manager import WebSocketConnectionManager
from tests.support.fake_websocket import FakeServer, eventually, settle, with_deadline
from tests.support.own_loop import run
from tests.support.versions import HAS_PROTOCOL_CLASS


async def connected(manager: Any, client_id: str) -> tuple[FakeServer, Any]:
    server = FakeServer()
    return server, await manager.connect(client_id, await server.accepted())


async def test_room_message_reaches_members_once_and_no_others(manager_with: Any) -> None:
    """Members of several rooms get one copy, and excluded clients and non-members get none."""
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


async def test_room_is_removed_with_its_last_member(manager_with: Any) -> None:
    """A room is removed by a leave, by closing it, and by the end of the connection."""
    manager, _ = manager_with()
    _, ann = await connected(manager, "ann")
    server, bob = await connected(manager, "bob")
    for room in ("one", "two", "three"):
        await ann.join(room)
    await bob.join("three")
    assert manager.get_rooms() == ["one", "two", "three"]
    assert await ann.leave("one")
    assert not await ann.leave("one")
    assert await manager.room("two").close() == 1
    assert ann.rooms == ("three",)
    room = manager.room("three")
    assert (len(room), room.members, "bob" in room, ann in room, bool(room)) == (2, [ann, bob], True, True, True)
    assert await room.disconnect(4403, "bye") == 2
    assert manager.get_rooms() == []
    assert not room
    await eventually(lambda: server.close_frames == [(4403, "bye")])
    with pytest.raises(SocketClosed):
        await ann.join("one")
    assert "three" in repr(room)


async def test_max_rooms_per_connection_is_enforced(manager_with: Any) -> None:
    """A join beyond max_rooms_per_connection raises, and the error says what to do."""
    manager, _ = manager_with(max_rooms_per_connection=1)
    _, ann = await connected(manager, "ann")
    await ann.join("one")
    with pytest.raises(RoomLimitError, match="max_rooms_per_connection"):
        await ann.join("two")
    with pytest.raises(ValueError, match="room name must be"):
        manager.room("")


async def test_connections_of_client_share_one_presence_entry(manager_with: Any) -> None:
    """on_join runs for the first connection, on_leave for the last, and join returns a snapshot of the members."""
    manager, _ = manager_with(on_duplicate="allow")
    announced: list[tuple[str, str, str]] = []

    @manager.on_join
    async def joined(room: Room, presence: Presence) -> None:
        announced.append(("join", room.name, presence.client_id))

    @manager.on_leave
    async def on_left(room: Room, presence: Presence) -> None:
        announced.append(("leave", room.name, presence.client_id))

    _, first = await connected(manager, "ann")
    _, second = await connected(manager, "ann")
    await first.join("lobby", {"name": "Ann"})
    here = await second.join("lobby")
    assert [(presence.client_id, presence.connections, presence.metadata["name"]) for presence in here] == [
        ("ann", 2, "Ann")
    ]
    await first.leave("lobby")
    await settle()
    assert announced == [("join", "lobby", "ann")]
    assert manager.room("lobby").set_presence("ann", name="Anna")
    assert manager.room("lobby").presence[0].metadata == {"name": "Anna"}
    await second.leave("lobby")
    await eventually(lambda: announced[1:] == [("leave", "lobby", "ann")])
    assert manager.room("lobby").clients == []


@pytest.mark.parametrize(("code", "stays"), [(1001, True), (1006, True), (1000, False)])
async def test_lost_connection_stays_present_for_presence_grace(manager_with: Any, code: int, stays: bool) -> None:
    """After a lost connection a client is present for presence_grace; after a close it is removed at once."""
    manager, _ = manager_with(presence_grace=60)
    announced: list[str] = []
    manager.on_leave(lambda room, presence: announced.append(presence.client_id))
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


async def test_failing_room_hook_is_reported_with_room(manager_with: Any) -> None:
    """A bug in on_join is reported and affects no client."""
    manager, heard = manager_with()

    @manager.on_join
    async def joined(room: Room) -> None:
        raise ValueError(room.name)

    _, ann = await connected(manager, "ann")
    await ann.join("lobby")
    await eventually(lambda: heard.of("join_hook_failed"))
    assert heard.of("join_hook_failed")[0].fields == {"room": "lobby"}


async def test_on_slow_gets_socket_and_level_without_blocking(manager_with: Any) -> None:
    """on_slow gets each degree, and no sender waits for it."""
    manager, _ = manager_with(outbox_max_messages=1)
    announced: list[tuple[str, SlowConsumer]] = []

    @manager.on_slow
    async def slow(ws: Any, how: SlowConsumer) -> None:
        announced.append((ws.client_id, how))

    server, _ = await connected(manager, "ann")
    server.block()
    await manager.send_to_client("ann", "stuck")
    await server.until(lambda: len(server.offered) == 2)
    assert [await manager.send_to_client("ann", text) for text in "ab"] == [True, False]
    await eventually(lambda: ("ann", SlowConsumer.DISCONNECTED) in announced)
    server.release()


def test_uvicorn_options_include_manager_options(manager_with: Any) -> None:
    """The options contain protocol class, size, pings, compression, and a shutdown timeout."""
    manager, _ = manager_with(compression="none", max_message_size=1000, heartbeat_interval=7, heartbeat_timeout=8)
    options = manager.uvicorn_options()
    assert getattr(options.pop("ws"), "__name__", "auto") == (
        "StableWebSocketProtocol" if HAS_PROTOCOL_CLASS else "auto"
    )
    assert options == {
        "ws_max_size": 1000,
        "ws_ping_interval": 7,
        "ws_ping_timeout": 8,
        "ws_per_message_deflate": False,
        "timeout_graceful_shutdown": 7,  # a quarter of drain_timeout
    }


async def test_invalid_metadata_changes_nothing(manager_with: Any) -> None:
    """Metadata that is not a mapping, and invalid recipients, raise before anything has changed."""
    manager, _ = manager_with()
    _, ann = await connected(manager, "ann")
    with pytest.raises(TypeError, match="mapping"):
        await ann.join("lobby", ["no", "mapping"])
    assert ann.rooms == ()
    assert manager.get_rooms() == []
    with pytest.raises(TypeError, match="client ids and sockets"):
        await manager.broadcast("x", exclude=7)


async def test_discarded_join_snapshot_builds_no_list(manager_with: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A join with a discarded snapshot builds no list; a stored snapshot shows the members at the join."""
    manager, _ = manager_with()
    await manager.start()
    looks: list[str] = []
    states = presence_module._RoomPresence.all_states
    monkeypatch.setattr(
        presence_module._RoomPresence, "all_states", lambda room: looks.append(room.name) or states(room)
    )
    for number in range(50):
        await (await connected(manager, f"c{number}"))[1].join("lobby")
    assert looks == []
    stored = await (await connected(manager, "ann"))[1].join("lobby")
    _, late = await connected(manager, "late")
    await late.join("lobby")
    await late.leave("lobby")
    assert len(stored) == 51
    assert [presence.client_id for presence in stored[-2:]] == ["c49", "ann"]
    assert stored[0].client_id in repr(stored)
    assert looks == ["lobby"]


# ── long-lived room objects ──


async def test_room_created_before_start_is_joined_later(manager_with: Any) -> None:
    """A module may create its rooms long before the first connection starts the manager."""
    manager, _ = manager_with()
    room = manager.room("lobby")
    server, ann = await connected(manager, "ann")
    await ann.join("lobby")
    assert (room.members, room.clients, ann in room) == ([ann], ["ann"], True)
    assert (await room.send("hi")).succeeded == 1
    await server.until(lambda: server.data == ["hi"])
    assert await room.disconnect() == 1


def test_room_outlives_loop_it_was_created_on() -> None:
    """A manager that continues on another event loop keeps its existing room objects valid."""
    manager = WebSocketConnectionManager()
    rooms: list[Room] = []

    async def once() -> list[int]:
        server, ann = await connected(manager, "ann")
        await ann.join("lobby")
        rooms.append(manager.room("lobby"))
        await rooms[0].send("hi")
        await server.until(lambda: server.data == ["hi"])
        there = [len(room) for room in rooms]
        await rooms[0].disconnect()
        await with_deadline(ann._connection.closed)
        return there

    assert [run(once()), run(once())] == [[1], [1, 1]]


async def test_only_joined_client_or_socket_is_in_room(manager_with: Any) -> None:
    """A client is in a room with any of its connections, a socket only by itself, and other objects never."""
    manager, _ = manager_with(on_duplicate="allow")
    (_, tab), (_, other), (_, bob) = [await connected(manager, name) for name in ("ann", "ann", "bob")]
    await tab.join("lobby")
    await bob.join("attic")
    room = manager.room("lobby")
    assert [target in room for target in (tab, "ann")] == [True, True]
    assert [target in room for target in (other, bob, "bob", "unknown", None, 7)] == [False] * 6


# ── queued broadcasts ──


@pytest.fixture
def blocked_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every check report a long block of the event loop, so that the code yields."""
    monkeypatch.setattr(scheduling_module, "MAX_BLOCK", -1.0)


async def overtaken(manager: Any, later: Coroutine[Any, Any, Any], between: Coroutine[Any, Any, Any]) -> Any:
    """Start a long broadcast, and a `later` one that waits for it, and call a function in between."""
    first, second, between = [asyncio.ensure_future(c) for c in (manager.broadcast("first"), later, between)]
    await with_deadline(between)
    assert not first.done()
    await with_deadline(first)
    return await with_deadline(second)


@pytest.mark.usefixtures("blocked_loop")
async def test_member_closed_before_queued_broadcast_is_no_failure(manager_with: Any) -> None:
    """The recipients of a broadcast are determined when it starts, so clients that closed before are no failures."""
    manager, _ = manager_with()
    for number in range(20):
        await connected(manager, f"c{number}")
    _, bob = await connected(manager, "bob")
    await bob.join("lobby")
    assert await overtaken(manager, manager.room("lobby").send("later"), bob.close()) == BroadcastResult()


@pytest.mark.usefixtures("blocked_loop")
async def test_queued_broadcast_reaches_members_at_its_start(manager_with: Any) -> None:
    """A message to a room reaches the members at its start, including those that have just joined."""
    manager, _ = manager_with()
    (a, ann), (b, bob), (c, cleo) = [await connected(manager, name) for name in ("ann", "bob", "cleo")]
    await ann.join("lobby")
    await bob.join("lobby")

    async def move() -> None:
        await bob.leave("lobby")
        await cleo.join("lobby")

    result = await overtaken(manager, manager.broadcast("later", room=iter(["lobby"])), move())
    assert result.total == 2
    await c.until(lambda: len(c.data) == 2)
    await settle()
    assert (a.data, b.data, c.data) == (["first", "later"], ["first"], ["first", "later"])


@pytest.mark.usefixtures("blocked_loop")
@pytest.mark.parametrize("room", [None, "lobby"])
async def test_queued_broadcast_excludes_new_connection_of_client(manager_with: Any, room: str | None) -> None:
    """A client is excluded with all the connections that it has when the broadcast starts."""
    manager, _ = manager_with(on_duplicate="allow")
    clients = [await connected(manager, name) for name in ("ann", *(f"c{number}" for number in range(20)))]
    for _, socket in clients:
        await socket.join("lobby")
    tabs: list[FakeServer] = []

    async def serve_tab() -> None:
        server, tab = await connected(manager, "ann")
        await tab.join("lobby")
        tabs.append(server)
        await tab.wait_closed()

    running: list[asyncio.Future[None]] = []

    async def open_tab() -> None:
        running.append(asyncio.ensure_future(serve_tab()))
        await eventually(lambda: tabs)

    result = await overtaken(manager, manager.broadcast("later", room=room, exclude=iter(["ann"])), open_tab())
    assert result.total == 20
    for server, _ in clients[1:]:
        await server.until(lambda server=server: server.data == ["first", "later"])
    await settle()
    assert clients[0][0].data == ["first"]
    assert "later" not in tabs[0].data
    tabs[0].feed_disconnect(1001)
    await with_deadline(running[0])


@pytest.mark.usefixtures("blocked_loop")
async def test_cancelled_queued_broadcast_reaches_no_client(manager_with: Any) -> None:
    """A cancelled broadcast is not sent or counted, and those before and after it are complete."""
    manager, _ = manager_with()
    clients = [await connected(manager, name) for name in ("ann", "bob", "cleo")]
    first, second, third = [asyncio.ensure_future(manager.broadcast(text)) for text in ("first", "second", "third")]
    await asyncio.sleep(0)
    second.cancel()
    await with_deadline(asyncio.wait({first, second, third}))
    assert second.cancelled()
    assert manager.counters.broadcasts == 2
    for server, _ in clients:
        await server.until(lambda server=server: len(server.data) == 2)
        assert server.data == ["first", "third"]


async def test_each_broadcast_is_counted_once(manager_with: Any) -> None:
    """Each broadcast that has started counts once, also without recipients."""
    manager, _ = manager_with()
    await manager.broadcast("no recipient")
    await connected(manager, "ann")
    await manager.broadcast("ann")
    await manager.room("nowhere").send("x")
    assert manager.counters.broadcasts == 3


# ── many clients ──


@pytest.mark.usefixtures("blocked_loop")
async def test_room_close_yields_to_event_loop(manager_with: Any) -> None:
    """Room.close yields after a long block, and cancelling it leaves the remaining members in the room."""
    manager, _ = manager_with()
    for number in range(4):
        await (await connected(manager, f"c{number}"))[1].join("lobby")
    room = manager.room("lobby")
    closing = asyncio.ensure_future(room.close())
    sizes = []
    for _ in range(2):
        await asyncio.sleep(0)
        sizes.append(len(room))
    assert sizes == [3, 2]
    closing.cancel()
    await settle()
    assert len(room) == 2
    assert await room.close() == 2
    assert not room


@pytest.mark.usefixtures("blocked_loop")
async def test_room_disconnect_yields_to_event_loop(manager_with: Any) -> None:
    """Room.disconnect yields after a long block, and closes all connections."""
    manager, _ = manager_with()
    clients = [await connected(manager, f"c{number}") for number in range(3)]
    for _, socket in clients:
        await socket.join("lobby")
    disconnecting = asyncio.ensure_future(manager.room("lobby").disconnect(4000))
    ended = []
    for _ in range(3):
        await asyncio.sleep(0)
        ended.append(sum(socket.closed for _, socket in clients))
    assert ended == [1, 2, 3]
    assert await with_deadline(disconnecting) == 3


# ── hooks ──


class Crowd:
    """Hook that records its calls and waits for permission to continue.

    Attributes:
        begun: Client ids of the calls that have begun.
        most: Maximum number of concurrent calls.
        cancelled: Client ids of the cancelled calls.
    """

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.cancelled: list[str] = []
        self.running = self.most = 0
        self.may_end = asyncio.Event()

    async def __call__(self, _: Any, presence: Any) -> None:
        self.begun.append(str(getattr(presence, "client_id", presence)))
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.cancelled.append(self.begun[-1])
            raise
        finally:
            self.running -= 1


async def too_slow(manager: Any, *client_ids: str) -> list[FakeServer]:
    """Connect clients with an outbox of one message, and send them more than they take."""
    servers = []
    for client_id in client_ids:
        server, _ = await connected(manager, client_id)
        server.block()
        await manager.send_to_client(client_id, "stuck")
        await server.until(lambda server=server: len(server.offered) == 2)
        for text in "ab":
            await manager.send_to_client(client_id, text)
        servers.append(server)
    return servers


@pytest.mark.parametrize("event", ["join", "leave", "slow"])
async def test_room_and_slow_hooks_have_bounded_concurrency(manager_with: Any, event: str) -> None:
    """At most max_concurrent_cleanup hooks run at once, in all rooms together, and all are called in the end."""
    manager, _ = manager_with(max_concurrent_cleanup=2, outbox_max_messages=1, outbox_overflow="drop_newest")
    crowd = Crowd()
    getattr(manager, f"on_{event}")(crowd)
    names = [f"c{number}" for number in range(6)]
    servers = await too_slow(manager, *names) if event == "slow" else []
    if event != "slow":
        sockets = [(await connected(manager, name))[1] for name in names]
        for socket in sockets:
            await socket.join(f"room of {socket.client_id}")
    if event == "leave":
        await eventually(lambda: len(manager._node._tasks) == 0)  # until all joins have been announced
        for socket in sockets:
            await socket.leave(f"room of {socket.client_id}")
    await eventually(lambda: len(crowd.begun) == 2)
    await settle()
    assert (len(crowd.begun), crowd.most) == (2, 2)
    crowd.may_end.set()
    await eventually(lambda: len(crowd.begun) >= 6 and not crowd.running)
    assert crowd.most == 2
    for server in servers:
        server.release()


@pytest.mark.parametrize("event", ["join", "slow"])
async def test_shutdown_cancels_hanging_room_and_slow_hooks(manager_with: Any, event: str) -> None:
    """A shutdown cancels running hooks of rooms and of slow clients, without waiting for their timeouts."""
    manager, _ = manager_with(disconnect_grace=60, outbox_max_messages=1, outbox_overflow="drop_newest")
    crowd = Crowd()
    getattr(manager, f"on_{event}")(crowd)
    if event == "slow":
        await too_slow(manager, "ann")
    else:
        await (await connected(manager, "ann"))[1].join("lobby")
    await eventually(lambda: crowd.begun)
    await with_deadline(manager.graceful_shutdown(timeout=0.1))
    await eventually(lambda: crowd.cancelled)
    assert crowd.running == 0


# ── presence ──


async def lost(manager: Any, client_id: str) -> None:
    """Connect a client, let it join the room, and let its connection break."""
    server, socket = await connected(manager, client_id)
    await socket.join("lobby")
    server.feed_disconnect(1006)
    await socket.wait_closed()


async def test_room_close_ends_presence_of_lost_connections(manager_with: Any) -> None:
    """Closing a room ends the presence of all clients, including those with a lost connection, and announces it."""
    manager, _ = manager_with(presence_grace=60)
    joins: list[str] = []
    leaves: list[str] = []
    manager.on_join(lambda _, presence: joins.append(presence.client_id))
    manager.on_leave(lambda _, presence: leaves.append(presence.client_id))
    _, ann = await connected(manager, "ann")
    await ann.join("lobby")
    await lost(manager, "bob")
    room = manager.room("lobby")
    await eventually(lambda: joins == ["ann", "bob"])
    assert (len(room), room.clients) == (1, ["ann", "bob"])
    assert await room.close() == 1
    assert room.clients == []
    await eventually(lambda: sorted(leaves) == ["ann", "bob"])
    await lost(manager, "cleo")
    await eventually(lambda: joins[2:] == ["cleo"])
    assert await room.close() == 0
    await eventually(lambda: leaves[2:] == ["cleo"])


async def test_returned_endpoint_leaves_no_presence(manager_with: Any) -> None:
    """After the endpoint has returned, its client has no grace."""
    manager, _ = manager_with(presence_grace=60)
    async with manager.serve(FakeServer().websocket, "ann") as socket:
        await socket.join("lobby")
        assert manager.room("lobby").clients == ["ann"]
    assert socket.reason is DisconnectReason.COMPLETED
    assert manager.room("lobby").clients == []


async def test_rejected_client_leaves_no_presence(manager_with: Any) -> None:
    """A client that is disconnected for breaking a rule has no grace."""
    manager, _ = manager_with(presence_grace=60, inbox_max_messages=1, inbox_overflow="close")
    server, socket = await connected(manager, "ann")
    await socket.join("lobby")
    server.feed_text("a", "b", "c")
    assert (await with_deadline(socket.wait_closed())).cause is DisconnectReason.POLICY
    assert manager.room("lobby").clients == []


async def test_shutdown_ends_presence_of_lost_connections(manager_with: Any) -> None:
    """After a shutdown a manager holds no presence and no timer, and announces nothing."""
    manager, _ = manager_with(presence_grace=60)
    announced: list[str] = []
    manager.on_leave(lambda _, presence: announced.append(presence.client_id))
    await lost(manager, "bob")
    _, ann = await connected(manager, "ann")
    await ann.join("lobby")
    assert manager.room("lobby").clients == ["bob", "ann"]
    await manager.graceful_shutdown(timeout=1)
    await settle()
    assert manager.room("lobby").clients == []
    assert manager._node.hub.presence._timer is None
    assert announced == []
