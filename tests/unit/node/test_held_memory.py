"""Tests of memory held for clients: it is counted while held, released on every exit path, and limited."""

from __future__ import annotations

import asyncio
import gc
import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import HTTPException

from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.errors import (
    ConnectionNotFoundError,
    MemoryLimitExceededError,
    RoomLimitError,
    RoomNameError,
    SocketClosed,
)
from fastapi_ws_stabilizer.memory.budget import FRAME_OVERHEAD_BYTES
from fastapi_ws_stabilizer.socket import StableSocket
from tests.support.fake_link import soon, virtually
from tests.support.fake_websocket import FakeServer
from tests.support.stage import Line, Peer, Stage

BIG = "x" * 10_000


def held(stage: Stage) -> int:
    """Return the held bytes of all clients."""
    total = stage.manager.get_memory_usage()["total_memory"]
    assert isinstance(total, int)
    return total


async def opened(stage: Stage, client_id: str = "ann") -> Line:
    """Connect a plain client."""
    line = stage.plain(client_id)
    await soon()
    assert line.socket is not None
    return line


def causes(stage: Stage) -> list[str]:
    """Return the causes of all disconnects."""
    return [event.rpartition(" ")[2] for event in stage.events if event.startswith("disconnect")]


# ── what is counted ──


@virtually
async def test_memory_usage_reports_total_and_average() -> None:
    """The report has the total, the number of connections and the average."""
    async with Stage() as stage:
        assert stage.manager.get_memory_usage() == {
            "total_memory": 0,
            "connection_count": 0,
            "per_connection_average": 0.0,
        }
        for client_id in ("ann", "bob"):
            (await opened(stage, client_id)).socket.user_data["x"] = BIG  # type: ignore[union-attr]
        usage = stage.manager.get_memory_usage()
        assert 20_000 < usage["total_memory"] < 20_500
        assert usage["per_connection_average"] == usage["total_memory"] / 2


@virtually
async def test_nested_user_data_is_measured_deeply() -> None:
    """User data is measured recursively."""
    async with Stage() as stage:
        await opened(stage)
        await stage.manager.set_user_data("ann", "deep", {"a": [{"b": bytearray(10_000_000)}]})
        assert 10_000_000 < held(stage) < 10_001_000
    assert held(stage) == 0


@virtually
async def test_connection_metadata_is_counted_until_close() -> None:
    """The metadata passed to `connect()` counts for the connection until it closes."""
    async with Stage() as stage:
        server = FakeServer()
        socket = await stage.manager.connect("ann", await server.accepted(), {"x": BIG})
        assert held(stage) == socket._connection.memory_usage > 10_000
        socket.metadata["y"] = BIG
        assert held(stage) > 20_000
        await socket.close()
        assert held(stage) == 0


@virtually
async def test_presence_metadata_is_counted_while_member_in_room() -> None:
    """Presence metadata counts once, by its newest size, until the client leaves the room or closes."""
    async with Stage(presence_grace=5.0) as stage:
        line = await opened(stage)
        assert line.socket is not None
        await line.socket.join("lobby", {"about": BIG})
        await line.socket.join("garden", {"about": BIG})
        assert 20_000 < held(stage) == line.socket.held_bytes < 21_000
        await line.socket.join("garden", {"about": "small"})
        await line.socket.join("lobby")
        assert 10_000 < held(stage) < 11_000
        assert stage.manager.room("garden").set_presence("ann", about=BIG * 2)
        assert 30_000 < held(stage) == line.socket.held_bytes < 31_000
        await line.socket.leave("garden")
        assert 10_000 < held(stage) < 11_000
        await line.leaves()
        assert held(stage) == 0


@virtually
async def test_presence_metadata_over_limit_raises_unchanged() -> None:
    """`join` and `set_presence` raise `MemoryLimitExceededError`; rooms, presence and the total are unchanged."""
    async with Stage(max_memory_per_connection=15_000, max_rooms_per_connection=2) as stage:
        line = await opened(stage)
        assert line.socket is not None
        room = stage.manager.room("lobby")
        await line.socket.join("lobby", {"about": BIG})
        before = held(stage)
        with pytest.raises(MemoryLimitExceededError, match="max_memory_per_connection"):
            await line.socket.join("garden", {"about": BIG})
        with pytest.raises(MemoryLimitExceededError):
            await line.socket.join("lobby", {"about": BIG * 2})
        with pytest.raises(MemoryLimitExceededError):
            room.set_presence("ann", about=BIG * 2)
        with pytest.raises(RoomNameError):
            await line.socket.join("\n", {"about": "x"})
        assert (line.socket.rooms, room.presence[0].metadata, held(stage)) == (("lobby",), {"about": BIG}, before)
        await line.socket.join("garden")
        with pytest.raises(RoomLimitError):
            await line.socket.join("attic", {"about": "x"})
        assert held(stage) == before


@virtually
async def test_presence_metadata_of_two_connections_counts_once() -> None:
    """Presence metadata counts for the connection that set it last; when that one closes, for another connection."""
    async with Stage(on_duplicate="allow") as stage:
        first, second = await opened(stage), await opened(stage)
        assert first.socket is not None
        assert second.socket is not None
        await first.socket.join("lobby", {"about": BIG})
        await second.socket.join("lobby", {"about": BIG})
        assert (first.socket.held_bytes, second.socket.held_bytes) == (0, held(stage))
        await second.leaves(1000)
        assert 10_000 < first.socket.held_bytes == held(stage) < 11_000
        await first.leaves(1000)
        assert held(stage) == 0


@pytest.mark.parametrize("numbered", [True, False], ids=["session", "reconnect token"])
@virtually
async def test_presence_metadata_of_detached_client_is_counted(numbered: bool) -> None:
    """Presence metadata is retained for the client's return, and counts once before and after it."""
    async with Stage(session_ttl=60.0, presence_grace=1.0) as stage:
        peer = Peer(stage)
        line = await peer.dial() if numbered else await opened(stage)
        assert line.socket is not None
        await line.socket.join("lobby", {"about": BIG})
        before = held(stage)
        token = None if numbered else stage.manager.generate_reconnect_token("ann")
        await line.leaves()
        await asyncio.sleep(10)
        assert held(stage) == before
        line = await peer.dial() if numbered else stage.plain(token=token)
        await soon()
        assert line.socket is not None
        assert (line.socket.rooms, held(stage), line.socket.held_bytes) == (("lobby",), before, before)
        assert stage.manager.room("lobby").presence[0].metadata == {"about": BIG}
        if not numbered:
            stage.manager.generate_reconnect_token("ann")
        await line.leaves()
        await asyncio.sleep(70)
        assert held(stage) == 0


@virtually
async def test_presence_metadata_makes_client_evictable() -> None:
    """Under `max_total_memory`, presence metadata makes a client evictable; the client that joined last stays."""
    async with Stage(max_total_memory=35_000, presence_grace=60.0) as stage:
        lines = [await opened(stage, client_id) for client_id in ("ann", "bob", "cid", "dan")]
        for line in lines:
            assert line.socket is not None
            await line.socket.join("lobby", {"about": BIG})
            await soon()
        assert causes(stage) == ["memory"]
        assert stage.manager.get_active_connections() == ["bob", "cid", "dan"]
        assert held(stage) < 35_000


@virtually
async def test_message_sent_in_same_iteration_is_not_counted() -> None:
    """A message that is queued and flushed in one loop iteration is not counted."""
    async with Stage() as stage:
        line = await opened(stage)
        for _ in range(3):
            await stage.manager.broadcast(BIG)
            assert held(stage) == 0
        await soon()
        assert (len(line.server.data), held(stage)) == (3, 0)


@virtually
async def test_queued_broadcast_counts_once_for_all_recipients() -> None:
    """A queued broadcast counts once, until each recipient has received it or is closed."""
    async with Stage() as stage:
        lines = [await opened(stage, client_id) for client_id in ("ann", "bob", "cid")]
        for line in lines:
            line.server.block()
        await stage.manager.broadcast("in flight")
        await soon()
        await stage.manager.broadcast(BIG)
        await soon()
        assert held(stage) == 10_000 + FRAME_OVERHEAD_BYTES
        lines[0].server.release()
        await soon()
        await lines[1].leaves()
        assert held(stage) == 10_000 + FRAME_OVERHEAD_BYTES
        lines[2].server.release()
        await soon()
        assert held(stage) == 0


@virtually
async def test_queue_of_failed_connection_is_no_longer_counted() -> None:
    """When a send fails, messages queued behind it are no longer counted."""
    async with Stage() as stage:
        line = await opened(stage)
        line.server.block()
        for _ in range(4):
            await stage.manager.broadcast(BIG)
            await soon()
        assert held(stage) == 3 * (10_000 + FRAME_OVERHEAD_BYTES)
        line.server.fail(OSError("broken pipe"))
        await asyncio.sleep(2)
        assert (held(stage), causes(stage)) == (0, ["network_lost"])


@virtually
async def test_unread_messages_are_counted_until_read() -> None:
    """An unread message counts from its arrival until it is read or its connection is torn down."""
    async with Stage() as stage:
        stage.endpoint = lambda ws: stage.gate.wait()  # type: ignore[assignment,return-value]
        line = await opened(stage)
        await line.say(BIG, BIG)
        assert 20_000 < held(stage) < 20_300
        assert line.socket is not None
        await line.socket.receive()
        assert held(stage) < 10_300
        await line.leaves()
        stage.gate.set()
        await asyncio.sleep(30)
        assert held(stage) == 0


@virtually
async def test_replay_buffer_is_counted_until_acked() -> None:
    """Messages in the replay buffer count once until acknowledged, also when detached or still queued."""
    async with Stage() as stage:
        line = await Peer(stage).dial()
        line.server.block()
        for _ in range(3):
            await stage.manager.send_to_client("ann", BIG)
            await soon()
        total = held(stage)
        assert 30_000 < total - 3 * FRAME_OVERHEAD_BYTES < 30_500
        line.server.release()
        await soon()
        assert held(stage) == total
        await line.say({"type": "ack", "seq": 2})
        assert 10_000 < held(stage) - FRAME_OVERHEAD_BYTES < 10_200
        await line.leaves()
        assert 10_000 < held(stage) - FRAME_OVERHEAD_BYTES < 10_200
        await asyncio.sleep(200)
        assert held(stage) == 0


@virtually
async def test_short_messages_count_with_overhead() -> None:
    """The overhead of a message beside its text is counted in the outbox, the inbox and the replay buffer."""
    async with Stage(outbox_max_messages=3000, inbox_max_messages=3000, replay_max_messages=3000) as stage:
        stage.endpoint = lambda ws: stage.gate.wait()  # type: ignore[assignment,return-value]
        plain, numbered = await opened(stage, "bob"), await Peer(stage).dial()
        plain.server.block()
        numbered.server.block()
        await stage.manager.broadcast("in flight")
        await soon()
        before = held(stage)
        tracemalloc.start()
        try:
            for number in range(1000):
                await stage.manager.send_to_client("bob", f"{number}")
                await stage.manager.send_to_client("ann", f"{number}")
                plain.server.feed_text(f"message {number}")
            await soon()
            taken, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert plain.socket is not None
        assert plain.socket.unread_messages == plain.socket.queued_messages == 1000
        assert 0.6 < (held(stage) - before) / taken < 1.4
        stage.gate.set()


@pytest.mark.parametrize("value", [[], {"a": 1}, {"id": 17, "v": 1.5}, [[1234]], 1.5], ids=repr)
@virtually
async def test_unread_messages_count_parsed_size(value: object) -> None:
    """An unread message counts by its parsed objects, because a short text can parse to many objects."""
    async with Stage() as stage:
        stage.endpoint = lambda ws: stage.gate.wait()  # type: ignore[assignment,return-value]
        line = await Peer(stage).dial()
        texts = [json.dumps({"type": "msg", "seq": seq, "data": [value] * 500}) for seq in range(1, 21)]
        tracemalloc.start()
        try:
            line.server.feed_text(*texts)
            await soon()
            taken, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert line.socket is not None
        assert line.socket.unread_messages == 20
        assert 0.5 < held(stage) / taken < 2.5
        stage.gate.set()


@pytest.mark.parametrize("numbered", [False, True])
@virtually
async def test_write_after_session_end_is_not_counted(numbered: bool) -> None:
    """A write of a disconnect hook after the session has ended is not counted."""
    async with Stage() as stage:

        @stage.manager.on_disconnect
        async def note_it(ws: StableSocket, reason: DisconnectReason) -> None:
            ws.user_data["left"] = BIG
            ws.metadata["left"] = BIG

        line = await Peer(stage).dial() if numbered else await opened(stage)
        await line.leaves(1000)
        await asyncio.sleep(5)
        assert line.socket is not None
        assert (line.socket.user_data["left"], held(stage)) == (BIG, 0)


@virtually
async def test_detached_state_is_counted_including_hook_writes() -> None:
    """The detached state of a client with a token is counted, including what its disconnect hook writes."""
    async with Stage() as stage:

        @stage.manager.on_disconnect
        async def note_it(ws: StableSocket, reason: DisconnectReason) -> None:
            ws.user_data["left"] = BIG

        line = await opened(stage)
        token = stage.manager.generate_reconnect_token("ann")
        await line.leaves()
        assert 10_000 < held(stage) < 10_200
        again = stage.plain("ann", token=token)
        await soon()
        assert again.socket is not None
        assert again.socket.user_data["left"] == BIG
        again.socket.user_data["more"] = BIG
        assert 20_000 < held(stage) < 20_400
    assert held(stage) == 0


@virtually
async def test_user_data_copy_of_second_connection_is_counted() -> None:
    """The copy of user data that a second connection gets by its token counts until that connection closes."""
    async with Stage(on_duplicate="allow") as stage:
        first = await opened(stage)
        assert first.socket is not None
        first.socket.user_data["x"] = BIG
        token = stage.manager.generate_reconnect_token("ann")
        second = stage.plain("ann", token=token)
        await soon()
        assert second.socket is not None
        assert second.socket.user_data == {"x": BIG}
        assert 20_000 < held(stage) < 20_400
        await second.leaves(1000)
        second.socket.user_data["y"] = 1
        assert 10_000 < held(stage) < 10_200
        assert first.socket.user_data == {"x": BIG}


@virtually
async def test_handshake_hook_user_data_counts_once_in_session() -> None:
    """User data set in on_handshake counts once, with the first connection and after a resume."""
    async with Stage() as stage:

        @stage.manager.on_handshake
        async def note_it(ws: StableSocket) -> None:
            ws.user_data["user"] = BIG

        peer = Peer(stage)
        for _ in range(2):
            line = await peer.dial()
            assert line.socket is not None
            assert line.socket.user_data == {"user": BIG}
            assert 10_000 < held(stage) < 10_200
            await line.leaves()
        await asyncio.sleep(200)
        assert held(stage) == 0


@pytest.mark.parametrize("numbered", [False, True])
@virtually
async def test_failed_handshake_holds_no_memory(numbered: bool) -> None:
    """User data set in on_handshake is released when the handshake fails."""
    async with Stage(hello_timeout=5) as stage:

        @stage.manager.on_handshake
        async def note_it(ws: StableSocket) -> None:
            ws.user_data["user"] = BIG
            if not numbered:
                raise RuntimeError("a bug")

        line = Line(stage, subprotocols=("stabilizer.v1.json",) if numbered else ())
        await soon()
        assert (held(stage) > 10_000) is numbered
        await asyncio.sleep(10)
        assert (line.socket, held(stage)) == (None, 0)


@virtually
async def test_write_after_failed_handshake_is_not_counted() -> None:
    """A write to the socket of a rejected client, which a task may still hold, is not counted."""
    async with Stage() as stage:
        rejected: list[StableSocket] = []

        @stage.manager.on_handshake
        async def refuse(ws: StableSocket) -> None:
            rejected.append(ws)
            raise HTTPException(403)

        Line(stage)
        await soon()
        (ws,) = rejected
        ws.user_data["late"] = BIG
        ws.metadata["late"] = BIG
        assert (ws.user_data, ws.metadata, held(stage)) == ({"late": BIG}, {"late": BIG}, 0)


# ── the limit of one connection ──


@virtually
async def test_write_over_limit_raises_and_retains_old_value() -> None:
    """A write over the limit raises and the old value stays, `None` included; the connection stays open."""
    async with Stage(max_memory_per_connection=5_000) as stage:
        line = await opened(stage)
        await stage.manager.set_user_data("ann", "x", None)
        with pytest.raises(MemoryLimitExceededError):
            await stage.manager.set_user_data("ann", "x", BIG)
        assert line.socket is not None
        with pytest.raises(MemoryLimitExceededError):
            line.socket.user_data["x"] = BIG
        with pytest.raises(MemoryLimitExceededError):
            line.socket.user_data = {"y": BIG}
        assert line.socket.user_data == {"x": None}
        assert not line.socket.closed


@virtually
async def test_user_data_assignment_copies_dict_or_raises() -> None:
    """Assigning user data copies the dict, also the same one; assigning `None` raises `TypeError`."""
    async with Stage(max_memory_per_connection=5_000) as stage:
        line = await opened(stage)
        assert line.socket is not None
        line.socket.user_data = {"x": 1}
        line.socket.user_data = line.socket.user_data
        with pytest.raises(TypeError):
            line.socket.user_data = None  # type: ignore[assignment]
        assert line.socket.user_data == {"x": 1}


@virtually
async def test_set_user_data_of_unknown_client_raises() -> None:
    """`set_user_data` of an unknown client raises `ConnectionNotFoundError`, not a memory error."""
    async with Stage(max_memory_per_connection=5_000) as stage:
        with pytest.raises(ConnectionNotFoundError):
            await stage.manager.set_user_data("unknown", "x", BIG)


@virtually
async def test_set_user_data_over_limit_changes_no_connection() -> None:
    """If one of several connections of a client cannot hold the value, none of them stores it."""
    async with Stage(max_memory_per_connection=15_000, on_duplicate="allow") as stage:
        first, second = await opened(stage), await opened_too(stage)
        assert first.socket is not None
        assert second.socket is not None
        second.socket.user_data["much"] = BIG
        with pytest.raises(MemoryLimitExceededError):
            await stage.manager.set_user_data("ann", "x", BIG)
        assert (first.socket.user_data, list(second.socket.user_data)) == ({}, ["much"])


async def opened_too(stage: Stage) -> Line:
    """Open a second connection of the same client."""
    line = stage.plain()
    await soon()
    return line


@pytest.mark.parametrize("fills", ["queued", "unread", "logged"])
@virtually
async def test_queues_are_bounded_by_half_of_memory_limit(fills: str) -> None:
    """The bounds of outbox, inbox and replay buffer are lowered to half of `max_memory_per_connection`."""
    async with Stage(max_memory_per_connection=50_000, outbox_overflow="drop_oldest") as stage:
        stage.endpoint = lambda ws: stage.gate.wait()  # type: ignore[assignment,return-value]
        line = await (Peer(stage).dial() if fills == "logged" else opened(stage))
        if fills == "queued":
            line.server.block()
        for _ in range(6):
            if fills == "unread":
                await line.say(BIG)
            else:
                await stage.manager.send_to_client("ann", BIG)
                await soon()
        assert 15_000 < held(stage) < (31_000 if fills == "unread" else 25_000)  # the message at the bound is accepted
        assert line.close_code is None


@pytest.mark.parametrize("numbered", [False, True])
@virtually
async def test_total_over_connection_limit_closes_with_4503(numbered: bool) -> None:
    """If user data, queued and unread messages together exceed the limit, the next message closes with 4503."""
    async with Stage(max_memory_per_connection=25_000) as stage:
        stage.endpoint = lambda ws: stage.gate.wait()  # type: ignore[assignment,return-value]
        line = await (Peer(stage).dial() if numbered else opened(stage))
        assert line.socket is not None
        line.socket.user_data["x"] = BIG
        await stage.manager.send_to_client("ann", BIG) if numbered else None
        if numbered:
            await line.message("note", BIG, "x")
        else:
            await line.say(BIG, BIG, "x")
        assert line.close_code == 4503
        stage.gate.set()
        await asyncio.sleep(5)
        assert (held(stage), causes(stage)) == (0, ["memory"])
        assert [event.event for event in stage.heard.of("memory_limit_exceeded")] == ["memory_limit_exceeded"]


@virtually
async def test_total_over_connection_limit_closes_silent_client() -> None:
    """The limit also closes a client that neither reads nor sends, when its outbox and user data exceed it."""
    async with Stage(max_memory_per_connection=40_000, send_timeout=100, memory_check_interval=1000) as stage:
        line = await opened(stage)
        assert line.socket is not None
        line.socket.user_data["x"] = BIG * 3
        line.server.block()
        for _ in range(3):
            await stage.manager.send_to_client("ann", BIG)
            await soon()
        await asyncio.sleep(3)
        assert (line.socket.reason, held(stage)) == (DisconnectReason.MEMORY, 0)


@virtually
async def test_growth_inside_user_data_ends_connection_or_session() -> None:
    """Growth inside user data is found after `memory_check_interval`, for connected and detached clients."""
    async with Stage(max_memory_per_connection=5_000, memory_check_interval=10, max_detached_sessions=5) as stage:
        grown: list[list[str]] = []

        def add_list(line: Line) -> None:
            assert line.socket is not None
            line.socket.user_data["list"] = inside = []
            grown.append(inside)

        connected = await opened(stage, "ann")
        detached_v1 = await Peer(stage, "bob").dial()
        detached_plain = await opened(stage, "cid")
        stage.manager.generate_reconnect_token("cid")
        for line in (connected, detached_v1, detached_plain):
            add_list(line)
        await detached_v1.leaves()
        await detached_plain.leaves()
        for one in grown:
            one.append(BIG)
        assert (held(stage) < 1_000, stage.manager.get_session_counts()) == (True, {"sessions": 1, "away": 1})
        await asyncio.sleep(11)
        assert connected.close_code == 4503
        assert stage.manager.get_session_counts() == {"sessions": 0, "away": 0}
        await asyncio.sleep(5)
        assert held(stage) == 0


# ── the limit of all connections ──


@pytest.mark.parametrize(("policy", "victim"), [("lru", "bob"), ("fifo", "ann"), ("oldest", "cid")])
@virtually
async def test_eviction_policy_selects_connection(policy: str, victim: str) -> None:
    """`lru` selects by the last message, `fifo` by connect time, and `oldest` by the last delivery."""
    async with Stage(max_total_memory=35_000, memory_eviction_policy=policy) as stage:
        lines = {client_id: await opened(stage, client_id) for client_id in ("ann", "bob", "cid")}
        for line in lines.values():
            line.socket.user_data["x"] = BIG  # type: ignore[union-attr]
        for client_id in ("cid", "ann", "bob"):
            await stage.manager.send_to_client(client_id, "news")
            await soon()
        for client_id in ("bob", "cid", "ann"):
            await lines[client_id].say('{"type":"note"}')
        late = await opened(stage, "dan")
        late.socket.user_data["x"] = BIG  # type: ignore[union-attr]
        await soon()
        assert [client_id for client_id, line in lines.items() if line.close_code == 4503] == [victim]
        assert stage.manager.counters.evictions == 1
        assert stage.manager.counters.endings[DisconnectReason.MEMORY] == 1


@virtually
async def test_heartbeats_do_not_change_eviction_order() -> None:
    """`lru` does not count pings and pongs of a client as messages; `oldest` does not count ours as deliveries."""
    for policy in ("lru", "oldest"):
        async with Stage(max_total_memory=25_000, memory_eviction_policy=policy) as stage:
            ann, bob = await opened(stage, "ann"), await opened(stage, "bob")
            for line in (ann, bob):
                line.socket.user_data["x"] = BIG  # type: ignore[union-attr]
                if policy == "lru":
                    await line.say('{"type":"note"}')
                else:
                    await stage.manager.send_to_client(line.socket.client_id, "news")  # type: ignore[union-attr]
                    await soon()
            await ann.say('{"type":"pong"}', '{"type":"ping"}')
            assert ann.server.json[-1]["type"] == "pong" if policy == "lru" else True
            late = await opened(stage, "cid")
            late.socket.user_data["x"] = BIG  # type: ignore[union-attr]
            await soon()
            assert (ann.close_code, bob.close_code) == (4503, None), policy


@virtually
async def test_evicted_client_gets_4503_with_retry_hint() -> None:
    """An evicted client gets 4503 with `retry=` in the reason; the hook gets `memory`, the event the held bytes."""
    async with Stage(max_total_memory=15_000) as stage:
        ann = await opened(stage, "ann")
        ann.socket.user_data["x"] = BIG  # type: ignore[union-attr]
        bob = await opened(stage, "bob")
        bob.socket.user_data["x"] = BIG  # type: ignore[union-attr]
        await soon()
        ((code, text),) = ann.server.close_frames
        assert code == 4503
        assert text.startswith("out of memory; retry=")
        assert 0 < int(text.partition("retry=")[2]) <= 60_000
        await asyncio.sleep(2)
        assert causes(stage) == ["memory"]
        (event,) = stage.heard.of("connection_evicted")
        assert (event.fields["client_id"], event.fields["held_bytes"] > 10_000) == ("ann", True)


@virtually
async def test_detached_sessions_are_evicted_first() -> None:
    """Detached sessions are evicted in the order in which they detached; each counts as an eviction and ends."""
    async with Stage(max_total_memory=45_000) as stage:
        connected = await opened(stage, "ann")
        connected.socket.user_data["x"] = BIG  # type: ignore[union-attr]
        peer = Peer(stage, "bob")
        detached_v1 = await peer.dial()
        detached_plain = await opened(stage, "cid")
        token = stage.manager.generate_reconnect_token("cid")
        for line in (detached_v1, detached_plain):
            line.socket.user_data["x"] = BIG  # type: ignore[union-attr]
            await line.leaves()
        writer = await opened(stage, "dan")
        for key, evictions, sessions in (("1", 0, 1), ("2", 1, 0), ("3", 2, 0)):
            writer.socket.user_data[key] = BIG  # type: ignore[union-attr]
            await asyncio.sleep(2)
            assert (stage.manager.counters.evictions, stage.manager.get_session_counts()["sessions"]) == (
                evictions,
                sessions,
            )
        assert connected.close_code is None
        assert [event for event in stage.events if event.startswith("session_end")] == [
            "session_end bob memory",
            "session_end cid network_lost",
        ]
        assert (await peer.dial()).outcome == "lost"
        again = stage.plain("cid", token=token)
        await soon()
        assert again.socket is not None
        assert again.socket.resumed.value == "lost"


@virtually
async def test_evicted_v1_client_loses_session() -> None:
    """The eviction of a v1 client ends its session, which would otherwise still hold the memory."""
    async with Stage(max_total_memory=15_000) as stage:
        peer = Peer(stage, "ann")
        line = await peer.dial()
        await stage.manager.send_to_client("ann", BIG)
        await soon()
        other = await opened(stage, "bob")
        other.socket.user_data["x"] = BIG  # type: ignore[union-attr]
        await soon()
        assert (line.close_code, stage.manager.get_session_counts()["sessions"]) == (4503, 0)
        assert held(stage) < 10_200
        assert (await peer.dial()).outcome == "lost"


@virtually
async def test_evicted_session_with_running_handler_frees_memory() -> None:
    """An evicted session with a running handler releases its memory at once, so that no second client is evicted."""
    async with Stage(max_total_memory=35_000, disconnect_grace=10) as stage:
        stage.endpoint = lambda ws: stage.gate.wait()  # type: ignore[assignment,return-value]
        here = await opened(stage, "ann")
        here.socket.user_data["x"] = BIG  # type: ignore[union-attr]
        line = await Peer(stage, "bob").dial()
        await line.message("note", BIG)
        await line.leaves()
        writer = await opened(stage, "cid")
        writer.socket.user_data["x"] = BIG + BIG  # type: ignore[union-attr]
        await soon()
        assert (here.close_code, stage.manager.get_session_counts()["sessions"]) == (None, 0)


@pytest.mark.parametrize("path", ["v1", "token", "explicit"])
@virtually
async def test_resuming_client_is_evicted_last(path: str) -> None:
    """While a client resumes, its detached state is evicted only after all other clients."""
    async with Stage(max_total_memory=35_000) as stage:
        waiting = asyncio.Event()

        @stage.manager.on_handshake
        async def slow(ws: StableSocket) -> None:
            if ws.query_params.get("token"):
                await waiting.wait()

        @stage.manager.on_auth
        async def slow_too(ws: StableSocket, credential: str | None) -> None:
            if ws.client_id == "ann" and credential == "slow":
                await waiting.wait()

        peer = Peer(stage, "ann")
        line = await (peer.dial() if path == "v1" else opened(stage, "ann"))
        token = "" if path == "v1" else stage.manager.generate_reconnect_token("ann")
        line.socket.user_data["mine"] = BIG  # type: ignore[union-attr]
        await line.leaves()
        other = await opened(stage, "bob")
        other.socket.user_data["x"] = BIG  # type: ignore[union-attr]

        async def connect_explicitly() -> StableSocket:
            client_id = await stage.manager.validate_reconnect_token(token)
            await waiting.wait()
            return await stage.manager.connect(client_id, await FakeServer().accepted())

        task: asyncio.Task[Any] | None = None
        if path == "explicit":
            task = asyncio.ensure_future(connect_explicitly())
            await soon()
        elif path == "v1":
            line = await peer.dial(auth="slow")
        else:
            line = stage.plain("ann", token=token)
            await soon()
        writer = await opened(stage, "cid")
        writer.socket.user_data["x"] = BIG + BIG  # type: ignore[union-attr]
        waiting.set()
        await soon()
        assert other.close_code == 4503
        socket = await task if task is not None else line.socket
        assert socket.user_data == {"mine": BIG}
        await socket.close()
        await soon()


@virtually
async def test_resumed_client_over_memory_limit_evicts_others() -> None:
    """Data that a resuming client adds is counted with its restored data; other clients are evicted for it."""
    async with Stage(max_total_memory=35_000) as stage:

        @stage.manager.on_handshake
        async def note_it(ws: StableSocket) -> None:
            if ws.query_params.get("token"):
                ws.user_data["new"] = BIG

        ann = await opened(stage, "ann")
        token = stage.manager.generate_reconnect_token("ann")
        ann.socket.user_data["old"] = BIG  # type: ignore[union-attr]
        await ann.leaves()
        bob = await opened(stage, "bob")
        bob.socket.user_data["x"] = BIG  # type: ignore[union-attr]
        again = stage.plain("ann", token=token)
        await soon()
        assert again.socket is not None
        assert (again.socket.user_data, again.close_code) == ({"old": BIG, "new": BIG}, None)


@pytest.mark.parametrize("policy", ["replace", "allow"])
@pytest.mark.parametrize("left", [True, False])
@virtually
async def test_unrestorable_user_data_is_no_longer_counted(left: bool, policy: str) -> None:
    """If old user data does not fit beside the new data, the client has the new data; the old is no longer counted."""
    async with Stage(max_memory_per_connection=15_000, on_duplicate=policy) as stage:

        @stage.manager.on_handshake
        async def note_it(ws: StableSocket) -> None:
            if ws.query_params.get("token"):
                ws.user_data["new"] = BIG

        ann = await opened(stage, "ann")
        token = stage.manager.generate_reconnect_token("ann")
        ann.socket.user_data["old"] = BIG  # type: ignore[union-attr]
        if left:
            await ann.leaves()
        again = stage.plain("ann", token=token)
        await soon()
        assert again.socket is not None
        assert again.socket.user_data == {"new": BIG}
        assert stage.heard.of("user_data_lost")
        if policy == "allow" and not left:
            assert ann.socket.user_data == {"old": BIG}  # type: ignore[union-attr]
            await ann.leaves()
            await asyncio.sleep(200)
        assert held(stage) == again.socket._connection.memory_usage < 10_200


@virtually
async def test_explicit_connect_over_limit_releases_reservation() -> None:
    """`connect()` over the limit raises `MemoryLimitExceededError` and releases its connection slot."""
    async with Stage(max_memory_per_connection=5_000, max_connections=1) as stage:
        with pytest.raises(MemoryLimitExceededError):
            await stage.manager.connect("ann", await FakeServer().accepted(), {"x": BIG})
        assert held(stage) == 0
        socket = await stage.manager.connect("ann", await FakeServer().accepted())
        await socket.close()


@virtually
async def test_connect_does_not_wait_for_eviction() -> None:
    """`connect()` with metadata does not wait for the eviction that it causes, even if teardown is slow."""
    async with Stage(max_total_memory=15_000, disconnect_grace=10) as stage:

        @stage.manager.on_disconnect
        async def slow(ws: StableSocket, reason: DisconnectReason) -> None:
            await stage.gate.wait()

        ann = await opened(stage, "ann")
        ann.socket.user_data["x"] = BIG  # type: ignore[union-attr]
        ann.server.block()
        before = asyncio.get_running_loop().time()
        socket = await stage.manager.connect("bob", await FakeServer().accepted(), {"x": BIG})
        assert asyncio.get_running_loop().time() == before
        assert ann.socket.reason is DisconnectReason.MEMORY  # type: ignore[union-attr]
        ann.server.release()
        stage.gate.set()
        await socket.close()


@virtually
async def test_evicted_socket_raises_socket_closed_on_send() -> None:
    """The socket of an evicted client raises `SocketClosed` on send, and later writes to it are not counted."""
    async with Stage(max_total_memory=15_000) as stage:
        ann, bob = await opened(stage, "ann"), await opened(stage, "bob")
        ann.socket.user_data["x"] = BIG  # type: ignore[union-attr]
        bob.socket.user_data["x"] = BIG  # type: ignore[union-attr]
        with pytest.raises(SocketClosed):
            await ann.socket.send("more")  # type: ignore[union-attr]
        ann.socket.user_data["y"] = BIG  # type: ignore[union-attr]
        assert held(stage) < 10_200
        assert stage.bugs == []


@pytest.mark.parametrize("write", [lambda ws: ws.user_data.update(x=BIG), lambda ws: ws.metadata.update(x=BIG)])
@virtually
async def test_memory_budget_forgets_closed_clients(write: Callable[[StableSocket], object]) -> None:
    """After a client closes, the memory budget holds no entry for it."""
    async with Stage(max_total_memory=50_000) as stage:
        line = await opened(stage)
        write(line.socket)  # type: ignore[arg-type]
        await line.leaves(1000)
        await asyncio.sleep(5)
        budget = stage.manager._node.budget
        assert not budget._entries
        assert not budget._measured
        gc.collect()


# ── clients that hold nothing, and closed clients ──


@pytest.mark.parametrize("policy", ["lru", "fifo", "oldest"])
@virtually
async def test_client_without_held_memory_is_not_evicted(policy: str) -> None:
    """Idle clients stay, and the client that holds the most is evicted, under each policy."""
    async with Stage(max_total_memory=35_000, memory_eviction_policy=policy) as stage:
        idle = [await opened(stage, f"idle {number}") for number in range(5)]
        hog = await opened(stage, "hog")
        hog.server.block()
        for _ in range(5):
            await stage.manager.send_to_client("hog", BIG)
            await soon()
        assert hog.socket.reason is DisconnectReason.MEMORY  # type: ignore[union-attr]
        assert ([line.close_code for line in idle], held(stage)) == ([None] * 5, 0)


@pytest.mark.parametrize("policy", ["lru", "fifo", "oldest"])
@pytest.mark.parametrize("fills", ["queue", "log", "inbox", "user data", "detached state"])
@virtually
async def test_any_held_memory_makes_client_evictable(policy: str, fills: str) -> None:
    """Queued, unread and unacknowledged messages, user data and restored data each make a client evictable."""
    async with Stage(max_total_memory=35_000, memory_eviction_policy=policy) as stage:
        stage.endpoint = lambda ws: stage.gate.wait()  # type: ignore[assignment,return-value]
        ann = await (Peer(stage).dial() if fills == "log" else opened(stage))
        assert ann.socket is not None
        for client_id in ("dan", "eve"):  # one evicts the other; ann holds nothing at that time
            line = await opened(stage, client_id)
            line.socket.user_data["x"] = BIG * 2  # type: ignore[union-attr]
        await line.leaves(1000)
        if fills == "queue":
            ann.server.block()
            await stage.manager.send_to_client("ann", "first")
            await soon()
        if fills in ("queue", "log"):
            await stage.manager.send_to_client("ann", BIG * 2)
            await soon()
        elif fills == "inbox":
            await ann.say(BIG * 2)
        else:
            ann.socket.user_data["x"] = BIG * 2
        if fills == "detached state":
            token = stage.manager.generate_reconnect_token("ann")
            await ann.leaves()
            ann = stage.plain("ann", token=token)
            await soon()
        bob = await opened(stage, "bob")
        bob.socket.user_data["x"] = BIG * 2  # type: ignore[union-attr]
        await soon()
        assert ann.socket is not None
        assert ann.socket.reason is DisconnectReason.MEMORY
        assert bob.close_code is None


@pytest.mark.parametrize("kind", ["plain", "numbered", "superseded"])
@virtually
async def test_unread_messages_of_closed_client_are_discarded_first(kind: str) -> None:
    """Unread messages of a closed client are discarded and counted before any client is evicted."""
    async with Stage(max_total_memory=45_000, disconnect_grace=10) as stage:
        peer = Peer(stage)
        closed = await (opened(stage) if kind == "plain" else peer.dial())
        if kind != "plain":
            await closed.message("wait", 1)
            await closed.message("note", BIG, BIG, first=2)
        else:
            await closed.say('{"type":"wait"}', BIG, BIG)
        await closed.leaves(1006 if kind == "superseded" else 1000)
        if kind == "superseded":  # its session ends while its endpoint still runs
            peer.token = None
            await peer.dial()
        assert held(stage) > 20_000
        bob = await opened(stage, "bob")
        bob.socket.user_data["x"] = BIG  # type: ignore[union-attr]
        cid = await opened(stage, "cid")
        cid.socket.user_data["x"] = BIG + BIG  # type: ignore[union-attr]
        await soon()
        assert (bob.close_code, cid.close_code, stage.manager.counters.evictions) == (None, None, 0)
        assert held(stage) < 31_000
        assert stage.manager.counters.messages_discarded == 2


@virtually
async def test_queue_of_closing_client_is_discarded_first() -> None:
    """The queue of a closing client is discarded first, but the client still gets its close frame."""
    async with Stage(max_total_memory=35_000) as stage:
        ann = await opened(stage)
        ann.server.block()
        for text in ("first", BIG, BIG):
            await stage.manager.send_to_client("ann", text)
            await soon()
        closing = asyncio.ensure_future(ann.socket.close(code=4000))  # type: ignore[union-attr]
        await soon()
        assert held(stage) == 20_000 + 2 * FRAME_OVERHEAD_BYTES
        bob = await opened(stage, "bob")
        bob.socket.user_data["x"] = BIG + BIG  # type: ignore[union-attr]
        assert 20_000 < held(stage) < 20_200
        ann.server.release()
        await soon()
        assert (ann.close_code, len(ann.server.data), bob.close_code) == (4000, 1, None)
        await closing


@virtually
async def test_session_evicted_event_is_emitted_for_detached_session() -> None:
    """The eviction of a detached session emits `session_evicted` with `why="memory"`."""
    async with Stage(max_total_memory=15_000) as stage:
        line = await Peer(stage).dial()
        line.socket.user_data["x"] = BIG  # type: ignore[union-attr]
        await line.leaves()
        bob = await opened(stage, "bob")
        bob.socket.user_data["x"] = BIG  # type: ignore[union-attr]
        (event,) = stage.heard.of("session_evicted")
        assert (event.fields["client_id"], event.fields["why"], stage.manager.counters.evictions) == (
            "ann",
            "memory",
            1,
        )


@virtually
async def test_first_message_makes_detached_session_evictable() -> None:
    """A message to a detached client makes its session the first to be evicted."""
    async with Stage(max_total_memory=15_000) as stage:
        await (await Peer(stage).dial()).leaves()
        bob = await opened(stage, "bob")
        bob.socket.user_data["x"] = "small"  # type: ignore[union-attr]
        await stage.manager.send_to_client("ann", BIG)
        bob.socket.user_data["x"] = BIG  # type: ignore[union-attr]
        assert (bob.socket.closed, stage.manager.get_session_counts()["sessions"]) == (False, 0)  # type: ignore[union-attr]


# ── resuming clients ──


@pytest.mark.parametrize("path", ["v1", "token"])
@virtually
async def test_write_needing_memory_of_resuming_client_raises(path: str) -> None:
    """A write that would evict a resuming client raises; after the resume the client is evictable again."""
    async with Stage(max_total_memory=25_000) as stage:
        release = asyncio.Event()

        @stage.manager.on_handshake
        async def slow(ws: StableSocket) -> None:
            if ws.query_params.get("token"):
                await release.wait()

        @stage.manager.on_auth
        async def slow_too(ws: StableSocket, credential: str | None) -> None:
            if credential == "slow":
                await release.wait()

        peer = Peer(stage, "ann")
        line = await (peer.dial() if path == "v1" else opened(stage, "ann"))
        token = "" if path == "v1" else stage.manager.generate_reconnect_token("ann")
        line.socket.user_data["mine"] = BIG  # type: ignore[union-attr]
        await line.leaves()
        bob = await opened(stage, "bob")
        line = await peer.dial(auth="slow") if path == "v1" else stage.plain("ann", token=token)
        await soon()
        with pytest.raises(MemoryLimitExceededError):
            bob.socket.user_data["x"] = BIG * 2  # type: ignore[union-attr]
        release.set()
        await soon()
        assert line.socket is not None
        assert line.socket.user_data == {"mine": BIG}
        assert not stage.manager._node.budget._pinned


@virtually
async def test_session_is_evictable_after_rejected_resume() -> None:
    """A rejected resume does not exempt the session from eviction."""
    async with Stage(max_total_memory=25_000) as stage:

        @stage.manager.on_auth
        async def look(ws: StableSocket, credential: str | None) -> None:
            if credential == "bad":
                raise PermissionError

        peer = Peer(stage, "ann")
        line = await peer.dial()
        bob = await opened(stage, "bob")
        for one in (line, bob):
            one.socket.user_data["x"] = BIG  # type: ignore[union-attr]
        await line.leaves()
        await peer.dial(auth="bad")
        cid = await opened(stage, "cid")
        cid.socket.user_data["x"] = BIG  # type: ignore[union-attr]
        assert (bob.socket.closed, stage.manager.get_session_counts()["sessions"]) == (False, 0)  # type: ignore[union-attr]


@virtually
async def test_explicit_connect_metadata_does_not_evict_own_state() -> None:
    """`connect()` raises if its metadata does not fit beside the client's detached state; otherwise both remain."""
    async with Stage(max_total_memory=25_000) as stage:
        line = await opened(stage)
        line.socket.user_data["mine"] = BIG  # type: ignore[union-attr]
        token = stage.manager.generate_reconnect_token("ann")
        await line.leaves()
        client_id = await stage.manager.validate_reconnect_token(token)
        with pytest.raises(MemoryLimitExceededError):
            await stage.manager.connect(client_id, await FakeServer().accepted(), {"x": BIG * 2})
        socket = await stage.manager.connect(client_id, await FakeServer().accepted(), {"x": BIG})
        assert (socket.user_data, socket.metadata) == ({"mine": BIG}, {"x": BIG})
        await socket.close()


# ── metadata and user data of a session ──


@pytest.mark.parametrize("early", [False, True])
@virtually
async def test_connection_metadata_counts_for_session(early: bool) -> None:
    """Connection metadata counts in the session's total and limit, can evict others, and is released at disconnect."""
    async with Stage(max_memory_per_connection=25_000, max_total_memory=30_000) as stage:

        @stage.manager.on_handshake
        async def note_it(ws: StableSocket) -> None:
            if early and ws.client_id == "ann":
                ws.metadata["x"] = BIG

        peer = Peer(stage)
        line = await peer.dial()
        ws = line.socket
        assert ws is not None
        ws.metadata["x"] = BIG
        assert ws.held_bytes > 10_000
        ws.user_data["x"] = BIG
        with pytest.raises(MemoryLimitExceededError, match="max_memory_per_connection"):
            ws.metadata["y"] = BIG
        del ws.metadata["x"]
        bob = await opened(stage, "bob")
        bob.socket.user_data["x"] = BIG + BIG[:5_000]  # type: ignore[union-attr]
        ws.metadata["x"] = BIG
        assert (ws.closed, bob.socket.closed) == (False, True)  # type: ignore[union-attr]
        await line.leaves()
        assert held(stage) < 10_300


@virtually
async def test_in_place_union_of_user_data_is_one_write() -> None:
    """`ws.user_data |= ...` is one write, accepted even if another value has grown above the limit."""
    async with Stage(max_memory_per_connection=5_000) as stage:
        line = await opened(stage)
        ws = line.socket
        assert ws is not None
        ws.user_data["list"] = grown = ["x"]
        grown.append(BIG)
        ws.user_data |= {"y": 1}
        assert list(ws.user_data) == ["list", "y"]


@virtually
async def test_handshake_hook_data_over_session_limit_is_lost() -> None:
    """The session retains its own data at every resume, and the hook's data over the limit is not held."""
    async with Stage(max_memory_per_connection=10_000) as stage:

        @stage.manager.on_handshake
        async def note_it(ws: StableSocket) -> None:
            if peer.dials > 1:
                ws.user_data["profile"] = "x" * 6_000
                ws.metadata["more"] = "here"

        peer = Peer(stage)
        line = await peer.dial()
        line.socket.user_data["cart"] = "y" * 5_000  # type: ignore[union-attr]
        for dial in (1, 2):
            await line.leaves()
            line = await peer.dial()
            assert line.socket is not None
            assert (line.outcome, list(line.socket.user_data)) == ("full", ["cart"])
            assert len(stage.heard.of("user_data_lost")) == dial
            assert 5_000 < held(stage) < 5_400
            assert held(stage) == line.socket.held_bytes
        assert stage.bugs == []


@virtually
async def test_handshake_hook_data_is_moved_without_double_memory() -> None:
    """Data of on_handshake is moved into the session: if it fits beside the existing data, no client is evicted."""
    async with Stage(max_total_memory=25_000) as stage:

        @stage.manager.on_handshake
        async def note_it(ws: StableSocket) -> None:
            if peer.dials > 1:
                ws.user_data["profile"] = BIG

        peer = Peer(stage)
        line = await peer.dial()
        line.socket.user_data["cart"] = BIG  # type: ignore[union-attr]
        await line.leaves()
        line = await peer.dial()
        assert line.socket is not None
        assert sorted(line.socket.user_data) == ["cart", "profile"]


# ── memory left for user data ──


@virtually
async def test_unacked_replay_buffer_leaves_memory_for_user_data() -> None:
    """The replay buffer holds at most half of the connection limit, so that writes of handlers do not fail."""
    async with Stage(max_memory_per_connection=100_000) as stage:
        line = await Peer(stage).dial()
        for _ in range(30):
            await stage.manager.broadcast(BIG[:4_900])
            await soon()
        assert line.socket is not None
        assert 40_000 < line.socket.held_bytes < 55_000
        line.socket.user_data["cursor"] = BIG
        await line.message("note", 1)
        assert line.close_code is None


@virtually
async def test_memory_limit_error_in_endpoint_closes_with_4503() -> None:
    """`MemoryLimitExceededError` in an endpoint closes with 4503, because 1008 would mean a bad credential."""
    async with Stage(max_memory_per_connection=5_000) as stage:

        async def writes(ws: StableSocket) -> None:
            ws.user_data["x"] = BIG

        stage.endpoint = writes
        line = stage.plain()
        await soon()
        assert (line.close_code, stage.bugs) == (4503, [])
