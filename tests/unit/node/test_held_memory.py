"""Tests of what is held for clients: that it is counted while it is held, given back on every way out, and limited."""

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
    """The sum."""
    total = stage.manager.get_memory_usage()["total_memory"]
    assert isinstance(total, int)
    return total


async def opened(stage: Stage, client_id: str = "ann") -> Line:
    """A plain client that is connected."""
    line = stage.plain(client_id)
    await soon()
    assert line.socket is not None
    return line


def reasons(stage: Stage) -> list[str]:
    """The reasons of all disconnects that were told."""
    return [event.rpartition(" ")[2] for event in stage.events if event.startswith("disconnect")]


# ── what is counted ──


@virtually
async def test_memory_usage_reports_total_and_average() -> None:
    """What is held for all, for how many, and how much that is for each."""
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
    """User data is measured deeply."""
    async with Stage() as stage:
        await opened(stage)
        await stage.manager.set_user_data("ann", "deep", {"a": [{"b": bytearray(10_000_000)}]})
        assert 10_000_000 < held(stage) < 10_001_000
    assert held(stage) == 0


@virtually
async def test_connection_metadata_is_counted_until_close() -> None:
    """What `connect()` is given is held for the connection, and goes with it."""
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
    """What a client is described with counts once, by its newest size, and goes when it leaves the room or ends."""
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
    """`join` and `describe` raise `MemoryLimitExceededError`; rooms, presence and the sum are as they were."""
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
    """The newest tab that describes the client answers for it; when that leaves, another one does."""
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
    """It is kept for the client's return, counts until then, and counts once afterwards."""
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
    """Under `max_total_memory` presence metadata makes others go, and the one who joined last stays."""
    async with Stage(max_total_memory=35_000, presence_grace=60.0) as stage:
        lines = [await opened(stage, client_id) for client_id in ("ann", "bob", "cid", "dan")]
        for line in lines:
            assert line.socket is not None
            await line.socket.join("lobby", {"about": BIG})
            await soon()
        assert reasons(stage) == ["memory"]
        assert stage.manager.get_active_connections() == ["bob", "cid", "dan"]
        assert held(stage) < 35_000


@virtually
async def test_message_sent_in_same_iteration_is_not_counted() -> None:
    """What is queued and sent in the same turn is in no sum."""
    async with Stage() as stage:
        line = await opened(stage)
        for _ in range(3):
            await stage.manager.broadcast(BIG)
            assert held(stage) == 0
        await soon()
        assert (len(line.server.data), held(stage)) == (3, 0)


@virtually
async def test_queued_broadcast_counts_once_for_all_recipients() -> None:
    """And is free when the last of them has got it, or is gone."""
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
    """A refused send leaves nothing in the sum of what was queued behind it."""
    async with Stage() as stage:
        line = await opened(stage)
        line.server.block()
        for _ in range(4):
            await stage.manager.broadcast(BIG)
            await soon()
        assert held(stage) == 3 * (10_000 + FRAME_OVERHEAD_BYTES)
        line.server.fail(OSError("broken pipe"))
        await asyncio.sleep(2)
        assert (held(stage), reasons(stage)) == (0, ["network_lost"])


@virtually
async def test_unread_messages_are_counted_until_read() -> None:
    """From the moment in which it came until it is read, or its connection is over."""
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
    """With a connection and without one; what waits to be sent too is in the log and counts once."""
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
    """What a message takes beside its text is counted, wherever it waits."""
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
    """A short text can be many objects."""
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
    """A hook that notes something when its client has left for good leaves nothing in the sum."""
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
    """The luggage of a client with a token is counted, also what its disconnect hook puts into it."""
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
    """The copy of user data that a second connection gets for its token counts, and goes with it."""
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
    """It counts once, with the first connection and with the next one."""
    async with Stage() as stage:

        @stage.manager.on_handshake
        async def note_it(ws: StableSocket) -> None:
            ws.user_data["who"] = BIG

        peer = Peer(stage)
        for _ in range(2):
            line = await peer.dial()
            assert line.socket is not None
            assert line.socket.user_data == {"who": BIG}
            assert 10_000 < held(stage) < 10_200
            await line.leaves()
        await asyncio.sleep(200)
        assert held(stage) == 0


@pytest.mark.parametrize("numbered", [False, True])
@virtually
async def test_failed_handshake_holds_no_memory(numbered: bool) -> None:
    """What its hook has noted goes with it."""
    async with Stage(hello_timeout=5) as stage:

        @stage.manager.on_handshake
        async def note_it(ws: StableSocket) -> None:
            ws.user_data["who"] = BIG
            if not numbered:
                raise RuntimeError("a bug")

        line = Line(stage, subprotocols=("stabilizer.v1.json",) if numbered else ())
        await soon()
        assert (held(stage) > 10_000) is numbered
        await asyncio.sleep(10)
        assert (line.socket, held(stage)) == (None, 0)


@virtually
async def test_write_after_failed_handshake_is_not_counted() -> None:
    """A hook's task may still have the socket of a client that was turned away."""
    async with Stage() as stage:
        turned_away: list[StableSocket] = []

        @stage.manager.on_handshake
        async def refuse(ws: StableSocket) -> None:
            turned_away.append(ws)
            raise HTTPException(403)

        Line(stage)
        await soon()
        (ws,) = turned_away
        ws.user_data["late"] = BIG
        ws.metadata["late"] = BIG
        assert (ws.user_data, ws.metadata, held(stage)) == ({"late": BIG}, {"late": BIG}, 0)


# ── the limit of one ──


@virtually
async def test_write_over_limit_raises_and_retains_old_value() -> None:
    """By `set_user_data` and by the socket, `None` included; nobody's connection ends."""
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
    """Also when it is the same one, or none at all."""
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
    """It is the error that it always was."""
    async with Stage(max_memory_per_connection=5_000) as stage:
        with pytest.raises(ConnectionNotFoundError):
            await stage.manager.set_user_data("nobody", "x", BIG)


@virtually
async def test_set_user_data_over_limit_changes_no_connection() -> None:
    """If one of several connections of a client may not hold it, none of them does."""
    async with Stage(max_memory_per_connection=15_000, on_duplicate="allow") as stage:
        first, second = await opened(stage), await opened_too(stage)
        assert first.socket is not None
        assert second.socket is not None
        second.socket.user_data["much"] = BIG
        with pytest.raises(MemoryLimitExceededError):
            await stage.manager.set_user_data("ann", "x", BIG)
        assert (first.socket.user_data, list(second.socket.user_data)) == ({}, ["much"])


async def opened_too(stage: Stage) -> Line:
    """One more connection of the same client."""
    line = stage.plain()
    await soon()
    return line


@pytest.mark.parametrize("fills", ["queued", "unread", "logged"])
@virtually
async def test_queues_are_bounded_by_half_of_memory_limit(fills: str) -> None:
    """The bounds of outbox, inbox and log are lowered to half of `max_memory_per_connection`."""
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
        assert 15_000 < held(stage) < (31_000 if fills == "unread" else 25_000)  # the message at the mark is taken
        assert line.close_code is None


@pytest.mark.parametrize("numbered", [False, True])
@virtually
async def test_total_over_connection_limit_closes_with_4503(numbered: bool) -> None:
    """User data, queued and unread messages, each within its bound, are together too much at the next message."""
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
        assert (held(stage), reasons(stage)) == (0, ["memory"])
        assert [report.event for report in stage.heard.of("memory_limit_exceeded")] == ["memory_limit_exceeded"]


@virtually
async def test_total_over_connection_limit_closes_silent_client() -> None:
    """A client that neither reads nor speaks is looked at too: its outbox beside its user data is too much."""
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
    """After `memory_check_interval`, with a connection, without one, and as luggage."""
    async with Stage(max_memory_per_connection=5_000, memory_check_interval=10, max_detached_sessions=5) as stage:
        grown: list[list[str]] = []

        def grows(line: Line) -> None:
            assert line.socket is not None
            line.socket.user_data["list"] = inside = []
            grown.append(inside)

        here = await opened(stage, "ann")
        away = await Peer(stage, "bob").dial()
        detached = await opened(stage, "cid")
        stage.manager.generate_reconnect_token("cid")
        for line in (here, away, detached):
            grows(line)
        await away.leaves()
        await detached.leaves()
        for one in grown:
            one.append(BIG)
        assert (held(stage) < 1_000, stage.manager.get_session_counts()) == (True, {"sessions": 1, "away": 1})
        await asyncio.sleep(11)
        assert here.close_code == 4503
        assert stage.manager.get_session_counts() == {"sessions": 0, "away": 0}
        await asyncio.sleep(5)
        assert held(stage) == 0


# ── the limit of all ──


@pytest.mark.parametrize(("policy", "victim"), [("lru", "bob"), ("fifo", "ann"), ("oldest", "cid")])
@virtually
async def test_eviction_policy_selects_connection(policy: str, victim: str) -> None:
    """The last message of a client, its coming, the last delivery to it: three clients, and each is the first once."""
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
    """Under `lru` pongs and pings of a client are no messages, and under `oldest` our pings and pongs no deliveries."""
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
    """4503, and `retry=` in the reason; the disconnect hook hears `memory`, and a report says how much it was."""
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
        assert reasons(stage) == ["memory"]
        (report,) = stage.heard.of("connection_evicted")
        assert (report.fields["client_id"], report.fields["held_bytes"] > 10_000) == ("ann", True)


@virtually
async def test_detached_sessions_are_evicted_first() -> None:
    """In the order in which they left; each is counted as evicted and its end is told."""
    async with Stage(max_total_memory=45_000) as stage:
        here = await opened(stage, "ann")
        here.socket.user_data["x"] = BIG  # type: ignore[union-attr]
        peer = Peer(stage, "bob")
        away = await peer.dial()
        detached = await opened(stage, "cid")
        token = stage.manager.generate_reconnect_token("cid")
        for line in (away, detached):
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
        assert here.close_code is None
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
    """Else what is held for it would be held on."""
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
    """A session whose unread messages are still being handled gives its room at once, so that one eviction is one."""
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


@pytest.mark.parametrize("way", ["v1", "token", "explicit"])
@virtually
async def test_resuming_client_is_evicted_last(way: str) -> None:
    """While its handshake runs, what a client has left is the last that would go for others."""
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
        line = await (peer.dial() if way == "v1" else opened(stage, "ann"))
        token = "" if way == "v1" else stage.manager.generate_reconnect_token("ann")
        line.socket.user_data["mine"] = BIG  # type: ignore[union-attr]
        await line.leaves()
        other = await opened(stage, "bob")
        other.socket.user_data["x"] = BIG  # type: ignore[union-attr]

        async def connect_explicitly() -> StableSocket:
            client_id = await stage.manager.validate_reconnect_token(token)
            await waiting.wait()
            return await stage.manager.connect(client_id, await FakeServer().accepted())

        task: asyncio.Task[Any] | None = None
        if way == "explicit":
            task = asyncio.ensure_future(connect_explicitly())
            await soon()
        elif way == "v1":
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
    """What it has brought with it is added to what it had: others go for that, and not the client itself."""
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
    """A client whose old data do not fit beside its new ones keeps the new ones; the old ones leave the sum."""
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
    """`MemoryLimitExceededError`, as any write; the next client finds room."""
    async with Stage(max_memory_per_connection=5_000, max_connections=1) as stage:
        with pytest.raises(MemoryLimitExceededError):
            await stage.manager.connect("ann", await FakeServer().accepted(), {"x": BIG})
        assert held(stage) == 0
        socket = await stage.manager.connect("ann", await FakeServer().accepted())
        await socket.close()


@virtually
async def test_connect_does_not_wait_for_eviction() -> None:
    """A client that must go for the metadata of a new one, and whose end takes long, holds nobody up."""
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
    """Who has to go for another's write finds its socket closed, and nothing breaks."""
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
    """When a client is gone, no order and no list of dicts knows it any more."""
    async with Stage(max_total_memory=50_000) as stage:
        line = await opened(stage)
        write(line.socket)  # type: ignore[arg-type]
        await line.leaves(1000)
        await asyncio.sleep(5)
        budget = stage.manager._node.budget
        assert not budget._entries
        assert not budget._measured
        gc.collect()


# ── who goes for nothing, and what is over ──


@pytest.mark.parametrize("policy", ["lru", "fifo", "oldest"])
@virtually
async def test_client_without_held_memory_is_not_evicted(policy: str) -> None:
    """Silent listeners stay, and the one that holds the most goes for what it holds, whatever the policy."""
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
    """Messages that wait, that are unread or unacknowledged, user data, and what a client has got back."""
    async with Stage(max_total_memory=35_000, memory_eviction_policy=policy) as stage:
        stage.endpoint = lambda ws: stage.gate.wait()  # type: ignore[assignment,return-value]
        ann = await (Peer(stage).dial() if fills == "log" else opened(stage))
        assert ann.socket is not None
        for client_id in ("dan", "eve"):  # one goes for the other, and nothing was held of ann then
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


@pytest.mark.parametrize("who", ["plain", "numbered", "superseded"])
@virtually
async def test_unread_messages_of_closed_client_are_discarded_first(who: str) -> None:
    """What nobody will read of a client that has left is thrown away, and counted, before anybody is ended."""
    async with Stage(max_total_memory=45_000, disconnect_grace=10) as stage:
        peer = Peer(stage)
        gone = await (opened(stage) if who == "plain" else peer.dial())
        if who != "plain":
            await gone.message("wait", 1)
            await gone.message("note", BIG, BIG, first=2)
        else:
            await gone.say('{"type":"wait"}', BIG, BIG)
        await gone.leaves(1006 if who == "superseded" else 1000)
        if who == "superseded":  # its session is over while it is still busy
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
    """And the client gets its close frame all the same."""
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
    """`session_evicted` with `why="memory"` for one that is away, as for what a plain client has left."""
    async with Stage(max_total_memory=15_000) as stage:
        line = await Peer(stage).dial()
        line.socket.user_data["x"] = BIG  # type: ignore[union-attr]
        await line.leaves()
        bob = await opened(stage, "bob")
        bob.socket.user_data["x"] = BIG  # type: ignore[union-attr]
        (report,) = stage.heard.of("session_evicted")
        assert (report.fields["client_id"], report.fields["why"], stage.manager.counters.evictions) == (
            "ann",
            "memory",
            1,
        )


@virtually
async def test_first_message_makes_detached_session_evictable() -> None:
    """Its client is away, and gets a message: now it is the first that goes."""
    async with Stage(max_total_memory=15_000) as stage:
        await (await Peer(stage).dial()).leaves()
        bob = await opened(stage, "bob")
        bob.socket.user_data["x"] = "small"  # type: ignore[union-attr]
        await stage.manager.send_to_client("ann", BIG)
        bob.socket.user_data["x"] = BIG  # type: ignore[union-attr]
        assert (bob.socket.closed, stage.manager.get_session_counts()["sessions"]) == (False, 0)  # type: ignore[union-attr]


# ── who is coming back ──


@pytest.mark.parametrize("way", ["v1", "token"])
@virtually
async def test_write_needing_memory_of_resuming_client_raises(way: str) -> None:
    """A write for which it would have to go is refused; and who does not get in goes as before."""
    async with Stage(max_total_memory=25_000) as stage:
        letting_in = asyncio.Event()

        @stage.manager.on_handshake
        async def slow(ws: StableSocket) -> None:
            if ws.query_params.get("token"):
                await letting_in.wait()

        @stage.manager.on_auth
        async def slow_too(ws: StableSocket, credential: str | None) -> None:
            if credential == "slow":
                await letting_in.wait()

        peer = Peer(stage, "ann")
        line = await (peer.dial() if way == "v1" else opened(stage, "ann"))
        token = "" if way == "v1" else stage.manager.generate_reconnect_token("ann")
        line.socket.user_data["mine"] = BIG  # type: ignore[union-attr]
        await line.leaves()
        bob = await opened(stage, "bob")
        line = await peer.dial(auth="slow") if way == "v1" else stage.plain("ann", token=token)
        await soon()
        with pytest.raises(MemoryLimitExceededError):
            bob.socket.user_data["x"] = BIG * 2  # type: ignore[union-attr]
        letting_in.set()
        await soon()
        assert line.socket is not None
        assert line.socket.user_data == {"mine": BIG}
        assert not stage.manager._node.budget._pinned


@virtually
async def test_session_is_evictable_after_rejected_resume() -> None:
    """A client whose credential is refused has moved its session to no better place."""
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
    """It is refused where it does not fit beside that, and else both are there."""
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
    """It is in its sum and under its limit, and room for it is made by others; it goes with its connection."""
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
    """`ws.user_data |= ...` is one write, also where a value has grown beyond what may be since it was measured."""
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
    """The session goes on with what it had, at every dial, and nothing of the rest is held."""
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
    """It moves: what fits beside what is there already gets in, and nobody goes for it."""
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


# ── what messages leave for the rest ──


@virtually
async def test_unacked_replay_buffer_leaves_memory_for_user_data() -> None:
    """Its log holds half of what one may hold at most, so that the writes of its handlers do not fail."""
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
    """4503: 1008 would say that its credential is not good."""
    async with Stage(max_memory_per_connection=5_000) as stage:

        async def writes(ws: StableSocket) -> None:
            ws.user_data["x"] = BIG

        stage.endpoint = writes
        line = stage.plain()
        await soon()
        assert (line.close_code, stage.bugs) == (4503, [])
