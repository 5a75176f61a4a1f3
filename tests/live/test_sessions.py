"""Sessions on real servers: cuts, stalls and swallowed data lose no messages."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from websockets.asyncio.client import connect as plain_connect

from fastapi_ws_stabilizer.client import Client, ClientClosedError, Gap, connect
from fastapi_ws_stabilizer.wire.v1.frames import SUBPROTOCOL
from tests.support.faulty_proxy import CuttingProxy
from tests.support.server import SERVERS, UVICORN, LiveServer, until

Serve = Callable[..., LiveServer]

APP = "tests.live.sessions_app:app"
QUICK_DIALS: dict[str, Any] = {"base_delay": 0.05, "max_delay": 0.3, "min_delay": 0.01, "connect_timeout": 2.0}

CUTS = 1000
MEAN_CUT_INTERVAL = 0.04


async def collect(client: Client, found: list[Any]) -> None:
    """Append the data of every message."""
    async for message in client:
        found.append(message.data)


@asynccontextmanager
async def cuttable_client(
    server: LiveServer, path: str
) -> AsyncIterator[tuple[CuttingProxy, Client, list[Any], list[str]]]:
    """Connect a client through a proxy that can cut it.

    Yields:
        The proxy, the client, the data of the received messages, and the outcome of each connect.
    """
    got: list[Any] = []
    outcomes: list[str] = []
    async with CuttingProxy(server.port) as proxy:
        client = connect(f"ws://127.0.0.1:{proxy.port}/ws/{path}", **QUICK_DIALS)
        client.on_open(outcomes.append)
        async with client:
            reader = asyncio.ensure_future(collect(client, got))
            try:
                yield proxy, client, got, outcomes
            finally:
                reader.cancel()


async def cut_at_random(proxy: CuttingProxy, cuts: int, chance: random.Random) -> None:
    """Break connections at random: resets, half-open ends, stalls and black holes."""
    done = 0
    while done < cuts:
        await asyncio.sleep(chance.random() * 2 * MEAN_CUT_INTERVAL)
        if not proxy.streams:
            continue
        stream = proxy.streams[-1]
        roll = chance.random()
        if roll < 0.55:
            stream.cut()
        elif roll < 0.7:
            stream.cut_near()
        elif roll < 0.85:
            stream.cut_far()
        elif roll < 0.97:
            await stream.stall(chance.random() * 0.05)
            continue
        else:
            stream.swallow()
        done += 1


async def exchange_during_cuts(server: LiveServer, cuts: int, seed: int) -> None:
    """Exchange twenty messages per second in each direction during cuts; both sides must then hold the same lists."""
    chance = random.Random(seed)
    said: list[int] = []
    pushed: list[int] = []
    got: list[Any] = []
    gaps: list[Gap] = []
    async with CuttingProxy(server.port) as proxy:
        client = connect(f"ws://127.0.0.1:{proxy.port}/ws/ann", probe_timeout=0.3, stable_after=0.2, **QUICK_DIALS)
        client.on_gap(gaps.append)
        async with client:
            reader = asyncio.ensure_future(collect(client, got))
            cutting = asyncio.ensure_future(cut_at_random(proxy, cuts, chance))
            number = 0
            while not cutting.done():
                number += 1
                client.send(number, event="say")
                said.append(number)
                await asyncio.to_thread(server.post, "/push/ann", {"number": number})
                pushed.append(number)
                if number % 40 == 0:
                    client.probe()
                await asyncio.sleep(0.05)
            await cutting
            last = client.send(number + 1, event="say")
            said.append(number + 1)
            await asyncio.wait_for(last, 20)
            await until(lambda: len(got) >= len(pushed), 20, f"{len(got)} of {len(pushed)} came, gaps {gaps}")
            reader.cancel()
    assert gaps == []
    assert [message["number"] for message in got] == pushed
    assert server.get("/received/ann") == said


@pytest.mark.timeout(60)
@pytest.mark.soak
@pytest.mark.parametrize("kind", ["uvicorn-sansio", "uvicorn-stable"])
async def test_sixty_random_cuts_lose_and_duplicate_nothing(serve: Serve, kind: str) -> None:
    """After 60 cuts, stalls and black holes both sides hold identical lists."""
    await exchange_during_cuts(serve(kind, app=APP), 60, seed=1)


@pytest.mark.soak
@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", ["uvicorn-sansio", "uvicorn-stable"])
async def test_thousand_random_cuts_lose_and_duplicate_nothing(serve: Serve, kind: str) -> None:
    """After 1,000 cuts with 20 messages per second in each direction, both sides hold identical lists."""
    await exchange_during_cuts(serve(kind, app=APP), CUTS, seed=2)


@pytest.mark.parametrize("kind", SERVERS)
async def test_messages_of_outage_arrive_after_reconnect(serve: Serve, kind: str) -> None:
    """After a broken TCP connection a client gets exactly the ten messages of the outage, in order."""
    server = serve(kind, app=APP)
    async with cuttable_client(server, "ann?room=lobby") as (proxy, client, got, outcomes):
        assert await client.request("note", "remember") == "remember"
        proxy.rejects = True
        proxy.streams[-1].cut()
        await until(lambda: server.get("/count")["detached"] == 1, 5)
        assert await asyncio.to_thread(server.post, "/push-many/ann/10")
        proxy.rejects = False
        await until(lambda: len(got) >= 10)
        assert await client.request("add", [1, 2]) == 3
        assert [message["number"] for message in got] == list(range(10))
        assert outcomes == ["none", "full"]
    expected = [
        "connect ann none",
        "disconnect ann network_lost",
        "resume ann full rooms=lobby data=remember",
        "disconnect ann client_close",
    ]
    if kind != "hypercorn":  # it does not report the close code, so the session stays
        expected.append("session_end ann client_close")
    await until(lambda: server.get("/events") == expected, 5, server.get("/events"))
    assert server.errors() == []


def check_prices(got: list[dict[str, int]], last: int) -> None:
    """Check that all notes came in order, and of the prices and cursors some in order and the last ones."""
    assert [message["note"] for message in got if "note" in message] == list(range(0, last + 1, 100))
    for name in ("price", "cursor"):
        values = [message[name] for message in got if name in message]
        assert values == sorted(set(values))
        assert values[-1] == last


@pytest.mark.parametrize("kind", ["uvicorn-sansio", "uvicorn-stable"])
async def test_absent_client_gets_newest_value_of_each_key(serve: Serve, kind: str) -> None:
    """While a client is away for 4 s, 1,000 values a second of a key leave one stored message, and no gap."""
    server = serve(kind, app=APP)
    async with cuttable_client(server, "ann") as (proxy, client, got, outcomes):
        await until(lambda: server.get("/count")["connections"] == 1, 5)
        proxy.rejects = True
        proxy.streams[-1].cut()
        await until(lambda: server.get("/count")["detached"] == 1, 5)
        sent = await asyncio.to_thread(server.post, "/prices/ann?seconds=4")
        notes = sent["last"] // 100 + 1
        assert sent["last"] > 3000
        assert sent["stored"] == notes + 2
        assert sent["coalesced"] == 2 * sent["last"]
        proxy.rejects = False
        await until(lambda: len(got) >= notes + 2)
        assert await client.request("add", [1, 2]) == 3
        assert outcomes == ["none", "full"]
        assert len(got) == notes + 2
        check_prices(got, sent["last"])
    assert server.errors() == []


@pytest.mark.parametrize("kind", ["uvicorn-sansio", "uvicorn-stable"])
async def test_values_of_keys_survive_cuts_and_stalls(serve: Serve, kind: str) -> None:
    """While connections break and stall, a client gets each note once and in order, and the last value of each key."""
    many = {"replay_max_messages": 20_000, "replay_max_bytes": 2**22}  # for what is sent into a half-open connection
    server = serve(kind, app=APP, config=many)
    async with cuttable_client(server, "ann") as (proxy, client, got, outcomes):
        await until(lambda: server.get("/count")["connections"] == 1, 5)
        sending = asyncio.ensure_future(asyncio.to_thread(server.post, "/prices/ann?seconds=5"))
        await cut_at_random(proxy, 40, random.Random(3))
        sent = await sending
        proxy.streams[-1].cut()  # the last one may swallow all data
        await until(lambda: {"cursor": sent["last"]} in got, 15)
        assert await client.request("add", [1, 2]) == 3
        assert set(outcomes) <= {"none", "full"}
        assert sent["coalesced"] > 100
        check_prices(got, sent["last"])
    assert server.errors() == []


@pytest.mark.parametrize("why", ["overflow", "unknown"])
async def test_late_resume_reports_gap_or_lost(serve: Serve, why: str) -> None:
    """More messages than the replay buffer holds are reported as a gap, and an expired session as lost."""
    config = {"replay_max_messages": 5} if why == "overflow" else {"session_ttl": 0.2}
    server = serve(app=APP, config=config)
    gaps: list[Gap] = []
    async with CuttingProxy(server.port) as proxy:
        client = connect(f"ws://127.0.0.1:{proxy.port}/ws/ann", **QUICK_DIALS)
        client.on_gap(gaps.append)
        async with client:
            proxy.rejects = True
            proxy.streams[-1].cut()
            await until(lambda: server.get("/count")["connections"] == 0, 5)
            if why == "overflow":
                await asyncio.to_thread(server.post, "/push-many/ann/10")
            else:
                await until(lambda: server.get("/count")["sessions"] == 0)
            proxy.rejects = False
            await until(lambda: gaps)
            assert [(gap.session_lost, gap.why) for gap in gaps] == [(why == "unknown", why)]
            assert await client.request("add", [1, 2]) == 3


@pytest.mark.parametrize("client_id", ["ann@example.com", "a.b.c", "😀", "x" * 200])
async def test_any_client_id_can_resume(serve: Serve, client_id: str) -> None:
    """A session resumes with any client id."""
    server = serve(app=APP)
    async with CuttingProxy(server.port) as proxy:
        client = connect(f"ws://127.0.0.1:{proxy.port}/ws/{client_id}", **QUICK_DIALS)
        outcomes: list[str] = []
        client.on_open(outcomes.append)
        async with client:
            proxy.streams[-1].cut()
            await until(lambda: outcomes == ["none", "full"])
            assert await client.request("add", [1]) == 1
    assert f"connect {client_id} none" in server.get("/events")


@pytest.mark.parametrize("kind", UVICORN)
async def test_half_open_connection_is_taken_over_at_once(serve: Serve, kind: str) -> None:
    """A new connection takes over the session of a half-open one within 2 s, before the server detects the loss."""
    server = serve(kind, app=APP)
    async with CuttingProxy(server.port) as proxy:
        client = connect(f"ws://127.0.0.1:{proxy.port}/ws/ann", **QUICK_DIALS)
        outcomes: list[str] = []
        client.on_open(outcomes.append)
        async with client:
            before = proxy.streams[-1]
            before.cut_near()
            began = asyncio.get_running_loop().time()
            await until(lambda: outcomes == ["none", "full"])
            assert await client.request("add", [1]) == 1
            assert asyncio.get_running_loop().time() - began < 2
            assert server.get("/events")[1:] == ["disconnect ann replaced", "resume ann full rooms= data=None"]
            assert server.get("/count") == {"connections": 1, "sessions": 1, "detached": 0}


async def test_requests_and_acks_survive_reconnect(serve: Serve) -> None:
    """A request of the server is answered on the next connection, and a message of the client is accepted there."""
    server = serve(app=APP)
    async with CuttingProxy(server.port) as proxy:
        client = connect(f"ws://127.0.0.1:{proxy.port}/ws/ann", **QUICK_DIALS)
        asked = asyncio.Event()

        @client.on("question")
        async def answer(question: str) -> str:
            if not asked.is_set():
                asked.set()
                proxy.streams[-1].cut()
                await asyncio.sleep(0)
            return f"{question}!"

        async with client:
            await client.send("why", event="ask_back")
            await asyncio.wait_for(asked.wait(), 5)
            accepted = client.send("while detached", event="say")
            await asyncio.wait_for(accepted, 5)
            await until(lambda: server.get("/received/answers") == ["why!"])
    assert server.get("/received/ann") == ["while detached"]


# ── first frames ──


async def first_frames(server: LiveServer, *frames: Any) -> tuple[int, str]:
    """Send frames on a new connection, and return the code and reason of its close."""
    async with plain_connect(server.url("/ws/ann"), subprotocols=[SUBPROTOCOL]) as ws:  # type: ignore[list-item]
        assert ws.subprotocol == SUBPROTOCOL
        for frame in frames:
            await ws.send(frame if isinstance(frame, (str, bytes)) else json.dumps(frame))
        await asyncio.wait_for(ws.wait_closed(), 5)
        return ws.close_code or 0, ws.close_reason or ""


@pytest.mark.parametrize("kind", UVICORN)
@pytest.mark.parametrize(
    "frame",
    [
        "no json",
        b"binary",
        {"type": "msg", "data": 1},
        {"type": "hello", "v": 2, "n": 1},
        {"type": "hello", "v": 1},
        {"type": "hello", "v": 1, "n": 1, "auth": "x" * 8200},
        {"type": "hello", "v": 1, "n": 1, "resume": {"token": "x" * 600, "seq": 0}},
    ],
    ids=["no json", "binary", "no hello", "version", "no n", "too long", "token too long"],
)
async def test_invalid_first_frame_closes_with_4400(serve: Serve, kind: str, frame: Any) -> None:
    """A malformed first frame closes with 4400 and another version with 4406; no session is left."""
    server = serve(kind, app=APP)
    code, reason = await first_frames(server, frame)
    assert code == (4406 if isinstance(frame, dict) and frame.get("v") == 2 else 4400), reason
    assert server.get("/count") == {"connections": 0, "sessions": 0, "detached": 0}
    assert server.errors() == []


@pytest.mark.parametrize("kind", UVICORN)
async def test_missing_hello_closes_with_4408(serve: Serve, kind: str) -> None:
    """A client without a hello is closed with 4408 after `hello_timeout`."""
    server = serve(kind, app=APP, config={"hello_timeout": 0.2})
    assert (await first_frames(server))[0] == 4408


# ── plain clients ──


async def test_reconnect_token_restores_rooms_and_user_data(serve: Serve) -> None:
    """A reconnect token restores rooms and user data; a client without one is new, and a used token is rejected."""
    server = serve(app=APP)
    token = server.post("/reconnect-token/ann@example.com")["token"]
    first = await plain_connect(server.url("/seed/ann@example.com"))
    await until(lambda: "seed ann@example.com none rooms= data=None" in server.get("/events"))
    first.transport.abort()
    await until(lambda: server.get("/count")["connections"] == 0)
    async with plain_connect(server.url(f"/seed/ann@example.com?token={token}")):
        await until(lambda: "seed ann@example.com gap rooms=lobby data=mine" in server.get("/events"))
    async with plain_connect(server.url(f"/seed/ann@example.com?token={token}")) as ws:
        await asyncio.wait_for(ws.wait_closed(), 5)
        assert (ws.close_code, ws.close_reason) == (4401, "invalid reconnect token")
    assert server.errors() == []


@pytest.mark.parametrize("kind", UVICORN)
async def test_query_token_restores_rooms_and_user_data(serve: Serve, kind: str) -> None:
    """`?reconnect_token=` works with the dependency alone, also while the dead old connection is undetected."""
    server = serve(kind, app=APP)
    token = server.post("/reconnect-token/ann")["token"]
    async with CuttingProxy(server.port) as proxy:
        async with plain_connect(f"ws://127.0.0.1:{proxy.port}/ws/ann?room=lobby") as first:
            await first.send('{"type":"note","text":"x"}')
            await until(lambda: "connect ann none" in server.get("/events"))
            proxy.streams[-1].cut_near()
        async with plain_connect(server.url(f"/ws/ann?reconnect_token={token}")) as ws:
            await until(lambda: any(event.startswith("resume ann gap rooms=lobby") for event in server.get("/events")))
            assert await asyncio.wait_for(ws.ping(), 5)
        token = server.post("/reconnect-token/ann")["token"]
        for bad in (token[:-2], f"{token}A", "wsr1.garbage"):
            async with plain_connect(server.url(f"/ws/bob?token={bad}")):
                await until(lambda: "connect bob none" in server.get("/events"))
    assert token not in server.log.replace("token=" + token, "")
    assert server.errors() == []


# ── compression ──


@pytest.mark.parametrize("kind", ["granian", "uvicorn-sansio", "uvicorn-stable"])
async def test_deflate_client_compresses_on_server_without_deflate(serve: Serve, kind: str) -> None:
    """With `deflate=True` large frames are compressed in both directions without permessage-deflate."""
    args = ("--ws-per-message-deflate", "false") if kind.startswith("uvicorn") else ()
    server = serve(kind, app=APP, args=args)
    text = "x" * 100_000
    client = connect(server.url("/ws/ann"), deflate=True, **QUICK_DIALS)
    received: list[str | bytes] = []
    async with client:
        assert client._connection is not None
        parse = client._connection._parse
        client._connection._parse = lambda raw: received.append(raw) or parse(raw)  # type: ignore[method-assign, func-returns-value]
        assert await client.request("note", text) == text
    answers = [raw for raw in received if isinstance(raw, bytes)]
    assert [raw[0] for raw in answers] == [2]
    assert len(answers[0]) < 1000


@pytest.mark.parametrize("kind", UVICORN)
@pytest.mark.parametrize("action", ["room", "remove", "members", "client"])
async def test_returning_plain_client_sees_closed_room_and_kick_code(serve: Serve, kind: str, action: str) -> None:
    """A returning plain client is not in a room that was closed to it, and gets the code of its kick."""
    server = serve(kind, app=APP)
    token = server.post("/reconnect-token/ann")["token"]
    first = await plain_connect(server.url("/ws/ann?room=lobby"))
    await until(lambda: "connect ann none" in server.get("/events"))
    first.transport.abort()
    await until(lambda: server.get("/count")["connections"] == 0)
    assert await asyncio.to_thread(server.post, f"/end/{action}/ann") == 1
    async with plain_connect(server.url(f"/ws/ann?reconnect_token={token}")) as ws:
        if action in ("members", "client"):
            await asyncio.wait_for(ws.wait_closed(), 5)
            assert (ws.close_code, ws.close_reason) == (4403, "banned")
        else:
            await until(lambda: server.get("/events")[-1] == "resume ann gap rooms= data=None")
            assert await asyncio.to_thread(server.post, "/say/lobby?text=secret") == 0
    assert server.errors() == []


@pytest.mark.parametrize("kind", ["uvicorn-sansio", "uvicorn-stable"])
@pytest.mark.parametrize("action", ["members", "client"])
async def test_detached_client_gets_kick_code_on_return(serve: Serve, kind: str, action: str) -> None:
    """A session client that is kicked while detached gets the code and reason of the kick on its return."""
    server = serve(kind, app=APP)
    async with CuttingProxy(server.port) as proxy:
        client = connect(f"ws://127.0.0.1:{proxy.port}/ws/ann?room=lobby", **QUICK_DIALS)
        with pytest.raises(ClientClosedError) as closed:
            async with client:
                proxy.rejects = True
                proxy.streams[-1].cut()
                await until(lambda: server.get("/count")["detached"] == 1, 5)
                assert await asyncio.to_thread(server.post, f"/end/{action}/ann") == 1
                proxy.rejects = False
                await asyncio.wait_for(client.request("add", [1, 2], timeout=5), 5)
    assert (closed.value.code, closed.value.reason) == (4403, "banned")
    assert server.get("/events").count("connect ann none") == 1


@pytest.mark.parametrize("kind", ["uvicorn-sansio", "uvicorn-stable"])
async def test_history_is_sent_once_across_cuts(serve: Serve, kind: str) -> None:
    """An endpoint that joins with history on each connection of a session sends it once, despite cuts."""
    server = serve(kind, app=APP, config={"room_history": 50})
    got: list[Any] = []
    async with CuttingProxy(server.port) as proxy:
        client = connect(f"ws://127.0.0.1:{proxy.port}/history/ann", **QUICK_DIALS)
        outcomes: list[str] = []
        client.on_open(outcomes.append)
        async with client:
            reader = asyncio.ensure_future(collect(client, got))
            for number, text in enumerate("abc"):
                await until(lambda number=number: len(outcomes) == number + 1)  # type: ignore[misc]
                assert await asyncio.to_thread(server.post, f"/say/lobby?text={text}") == 1
                proxy.streams[-1].cut()
            await until(lambda: len(outcomes) == 4)
            assert await client.request("add", [1, 2]) == 3
            reader.cancel()
    assert got == ["a", "b", "c"]
    assert outcomes == ["none", "full", "full", "full"]
