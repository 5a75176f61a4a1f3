"""Three typical apps run without workarounds for the library."""

from __future__ import annotations

import asyncio
import base64
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from fastapi_ws_stabilizer.client import ClientClosedError
from fastapi_ws_stabilizer.client import connect as connect_client
from tests.apps.answers import TOKENS
from tests.support.faulty_proxy import CuttingProxy
from tests.support.plain_client import next_of_type
from tests.support.raw import RawClient
from tests.support.server import LiveServer, until

Serve = Callable[..., LiveServer]
KINDS = ("uvicorn-sansio", "uvicorn-stable")
DEADLINE = 15.0

ANSWER = "".join(f"why{number} " for number in range(TOKENS))


# ── answers ──


@pytest.mark.parametrize("kind", KINDS)
async def test_answers_reach_python_client_whole_across_cuts(serve: Serve, kind: str) -> None:
    """Each token of an answer arrives once and in order, though the connection is cut three times."""
    server = serve(kind, app="tests.apps.answers:app")
    tokens: list[str] = []
    async with CuttingProxy(server.port) as proxy:
        url = f"ws://127.0.0.1:{proxy.port}/ws?token=secret-of-ann"
        async with connect_client(url, base_delay=0.05, min_delay=0.01) as client:
            await client.send({"type": "ask", "question": "why"}, event="ask")
            async for message in client:
                if message.event == "done":
                    break
                if message.event == "token":
                    tokens.append(message.data["text"])
                    if len(tokens) in (20, 80, 140):
                        proxy.streams[-1].cut()
    assert "".join(tokens) == ANSWER


@pytest.mark.parametrize("kind", KINDS)
async def test_answers_continue_while_page_is_disconnected(serve: Serve, kind: str) -> None:
    """A page that logs in with `?token=` resumes with its reconnect token, and gets the whole text."""
    server = serve(kind, app="tests.apps.answers:app")
    url = server.url("/ws?token=secret-of-ann")
    async with connect(url) as first:
        reconnect_token = (await next_of_type(first, "hello"))["reconnect_token"]
        await first.send(json.dumps({"type": "ask", "question": "why"}))
        for _ in range(20):
            await next_of_type(first, "token")
        first.transport.abort()
    await asyncio.sleep(0.3)
    async with connect(f"{url}&reconnect_token={reconnect_token}") as second:
        text = (await next_of_type(second, "so far"))["text"]
        while (message := await next_of_type(second, "token", "done"))["type"] == "token":
            text += message["text"]
    assert text == ANSWER
    assert server.get("/ended") in ([], ["client_close"])


@pytest.mark.parametrize("kind", KINDS)
async def test_reconnect_token_resumes_its_own_tab(serve: Serve, kind: str) -> None:
    """Each of two tabs of one user gets its own answer back."""
    server = serve(kind, app="tests.apps.answers:app")
    url = server.url("/ws?token=secret-of-ann")
    async with connect(url) as first_tab, connect(url) as second_tab:
        tokens = [(await next_of_type(tab, "hello"))["reconnect_token"] for tab in (first_tab, second_tab)]
        for tab, question in ((first_tab, "first"), (second_tab, "second")):
            await tab.send(json.dumps({"type": "ask", "question": question}))
            await next_of_type(tab, "token")
        first_tab.transport.abort()
        second_tab.transport.abort()
    for token, question in zip(tokens, ("first", "second"), strict=True):
        async with connect(f"{url}&reconnect_token={token}") as back:
            assert (await next_of_type(back, "so far"))["text"].startswith(f"{question}0 ")


@pytest.mark.parametrize("kind", KINDS)
async def test_thoughts_are_sent_while_handler_computes(serve: Serve, kind: str) -> None:
    """A message arrives when its handler sends it, though the handler blocks the event loop between sends."""
    server = serve(kind, app="tests.apps.answers:app")
    async with connect(server.url("/ws?token=secret-of-ann")) as client:
        await next_of_type(client, "hello")
        await client.send('{"type": "think"}')
        arrivals = []
        for _ in range(4):
            await next_of_type(client, "thought")
            arrivals.append(time.monotonic())
    assert arrivals[-1] - arrivals[0] > 0.6  # they would arrive together after 1.2 s of computing


# ── prices ──


@pytest.mark.parametrize("kind", KINDS)
async def test_prices_continue_after_only_client_stalls(serve: Serve, kind: str) -> None:
    """A client that does not read is disconnected; the publisher goes on, and a later client gets prices."""
    server = serve(kind, app="tests.apps.prices:app")
    with RawClient(server.port, "/ws/stalled", receive_buffer=4096) as stalled:
        stalled.handshake()
        await until(lambda: stats(server)["connections"] == 1)
        await until(lambda: stats(server)["connections"] == 0, DEADLINE, "the stalled client is disconnected")
    async with connect(server.url("/ws/late")) as late:
        first, second = await next_of_type(late, "price"), await next_of_type(late, "price")
    assert second["number"] > first["number"]
    assert server.errors() == []


@pytest.mark.parametrize("kind", KINDS)
async def test_prices_do_not_disconnect_talking_client(serve: Serve, kind: str) -> None:
    """A client may send keepalives to an endpoint that only waits for the end of its connection."""
    server = serve(kind, app="tests.apps.prices:app", config={})
    async with connect(server.url("/ws/page")) as page:
        for _ in range(600):
            await page.send("keepalive")
        for _ in range(50):
            await next_of_type(page, "price")
        await page.ping()
    assert "reading_paused" not in server.log


def stats(server: LiveServer, path: str = "/") -> Any:
    password = base64.b64encode(b"admin:password of the admin").decode()
    address = f"http://127.0.0.1:{server.port}/ws-stats{path}"
    request = urllib.request.Request(address, headers={"Authorization": f"Basic {password}"})
    with urllib.request.urlopen(request) as response:
        body = response.read().decode()
    return json.loads(body) if path == "/" else body


async def test_prices_stats_are_visible_to_admin_only(serve: Serve) -> None:
    """The stats router behind HTTP Basic answers only the admin, with metrics in Prometheus format."""
    server = serve("uvicorn-stable", app="tests.apps.prices:app")
    async with connect(server.url("/ws/page")) as page:
        await next_of_type(page, "price")
        metrics = list(text_string_to_metric_families(stats(server, "/metrics")))
    assert {"ws_connections"} & {metric.name for metric in metrics} or len(metrics) > 10
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.get("/ws-stats/")
    with refused.value as answer:
        assert answer.code == 401


# ── tables ──


@pytest.mark.parametrize("kind", KINDS)
async def test_tables_handler_gets_database_session_per_message(serve: Serve, kind: str) -> None:
    """A handler in a `functools.wraps` decorator gets a session, committed on return and rolled back on a bug."""
    server = serve(kind, app="tests.apps.tables:app")
    async with connect(server.url("/ws/ann")) as ann:
        await ann.send('{"type": "join", "room": "red"}')
        await next_of_type(ann, "here")
        await ann.send('{"type": "say", "room": "red", "line": "hello"}')
        assert (await next_of_type(ann, "said"))["line"] == "hello"
        await ann.send('{"type": "say", "room": "red", "line": "fail"}')
        with pytest.raises(ConnectionClosed):
            await next_of_type(ann, "said")
    assert server.get("/lines") == ["hello"]


@pytest.mark.parametrize("kind", KINDS)
async def test_tables_history_contains_only_messages(serve: Serve, kind: str) -> None:
    """The history of a room holds its messages but no announcements, and ends with the room."""
    server = serve(kind, app="tests.apps.tables:app")
    async with connect(server.url("/ws/ann")) as ann, connect(server.url("/ws/bob")) as bob:
        await ann.send('{"type": "join", "room": "red"}')
        await next_of_type(ann, "here")
        await ann.send('{"type": "say", "room": "red", "line": "hello"}')
        await ann.send('{"type": "typing", "room": "red"}')
        await next_of_type(ann, "said")
        await bob.send('{"type": "join", "room": "red"}')
        types = []
        while (message := json.loads(await asyncio.wait_for(bob.recv(), DEADLINE)))["type"] != "here":
            types.append(message["type"])
        assert types == ["said"]
        assert (await next_of_type(ann, "came"))["who"] == "bob"
    await until(lambda: is_closed(server, "red"), DEADLINE)
    async with connect(server.url("/ws/eve")) as eve:
        await eve.send('{"type": "join", "room": "red"}')
        assert json.loads(await asyncio.wait_for(eve.recv(), DEADLINE))["type"] == "here"


def is_closed(server: LiveServer, room: str) -> bool:
    try:
        server.get(f"/rooms/{room}")
    except urllib.error.HTTPError as error:
        with error:
            return error.code == 404
    return False


@pytest.mark.parametrize("kind", KINDS)
async def test_tables_kicked_detached_member_is_out_of_room(serve: Serve, kind: str) -> None:
    """A client kicked while detached returns outside the room, and gets no messages of the room from then."""
    server = serve(kind, app="tests.apps.tables:app")
    received_lines: list[str] = []
    async with CuttingProxy(server.port) as proxy, connect(server.url("/ws/bob")) as bob:
        async with connect_client(f"ws://127.0.0.1:{proxy.port}/ws/ann") as ann:

            @ann.on("said")
            def said(data: dict[str, str]) -> None:
                received_lines.append(data["line"])

            await ann.send({"type": "join", "room": "red"})
            await bob.send('{"type": "join", "room": "red"}')
            await until(lambda: set(server.get("/rooms/red")) == {"ann", "bob"})
            proxy.rejects = True
            proxy.streams[-1].cut()
            await asyncio.to_thread(server.post, "/rooms/red/kick/ann")
            await bob.send('{"type": "say", "room": "red", "line": "after the kick"}')
            await next_of_type(bob, "said")
            assert server.get("/rooms/red") == ["bob"]
            proxy.rejects = False
            await asyncio.wait_for(ann.wait_open(), DEADLINE)
            await ann.send({"type": "say", "room": "red", "line": "after the return"})
            await until(lambda: ann.state == "open")
            assert "after the kick" not in received_lines


@pytest.mark.parametrize("kind", KINDS)
async def test_tables_banned_detached_client_gets_4403(serve: Serve, kind: str) -> None:
    """A client banned while detached gets 4403 on its return."""
    server = serve(kind, app="tests.apps.tables:app")
    async with CuttingProxy(server.port) as proxy:
        client = connect_client(f"ws://127.0.0.1:{proxy.port}/ws/ann").start()
        await asyncio.wait_for(client.wait_open(), DEADLINE)
        proxy.rejects = True
        proxy.streams[-1].cut()
        await asyncio.sleep(0.2)
        await asyncio.to_thread(server.post, "/ban/ann")
        proxy.rejects = False
        with pytest.raises(ClientClosedError) as closed:
            async for _ in client:
                pass
        assert (closed.value.code, closed.value.reason) == (4403, "banned")
        await client.close()
