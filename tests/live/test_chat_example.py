"""Chat example, started by `python -m examples.chat`."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from websockets.asyncio.client import connect

from fastapi_ws_stabilizer.client import connect as connect_client
from tests.support.faulty_proxy import CuttingProxy
from tests.support.plain_client import next_of_type
from tests.support.server import until

pytestmark = pytest.mark.live

ROOT = Path(__file__).parents[2]
DEADLINE = 15.0


@pytest_asyncio.fixture
async def address() -> AsyncIterator[str]:
    """Host and port of a running chat, which must exit without a traceback."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "examples.chat", "--port", "0"),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        line = (await asyncio.wait_for(process.stdout.readline(), DEADLINE)).decode()
        assert line.startswith("Chat: http://"), line
        yield line.split()[1].removeprefix("http://")
        process.send_signal(signal.SIGINT)
        _, errors = await asyncio.wait_for(process.communicate(), DEADLINE)
        assert process.returncode == 0
        assert errors == b""
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_message_reaches_both_tabs_and_lost_tab_is_announced(address: str) -> None:
    """Two tabs named Ann are two members; both get a message, and the second learns why the first is lost."""
    async with (
        connect(f"ws://{address}/ws/tab-1?name=Ann") as first,
        connect(f"ws://{address}/ws/tab-2?name=Ann") as second,
    ):
        one, two = (await next_of_type(first, "welcome"))["you"], (await next_of_type(second, "welcome"))["you"]
        assert one["id"] != two["id"]
        await next_of_type(first, "joined"), await next_of_type(first, "joined")

        await first.send(json.dumps({"type": "say", "text": " hello "}))
        for client in (first, second):
            assert await next_of_type(client, "said") == {"type": "said", "who": one, "text": "hello", "key": ""}

        first.transport.abort()
        detached_event = await next_of_type(second, "away")
        assert detached_event == {
            "type": "away",
            "who": {**one, "away": True},
            "why": "network_lost",
            "people": [detached_event["who"], two],
        }
        left = await next_of_type(second, "left")  # a plain client has no session to resume
        assert left == {"type": "left", "who": detached_event["who"], "why": "network_lost", "people": [two]}


async def test_second_connection_of_tab_replaces_first_silently(address: str) -> None:
    """A newer connection of a tab replaces the older one, and no member joins or leaves."""
    url = f"ws://{address}/ws/tab-1?name=Ann"
    async with connect(f"ws://{address}/ws/other?name=Ben") as other, connect(url) as old, connect(url) as new:
        await next_of_type(new, "welcome")
        await asyncio.wait_for(old.wait_closed(), DEADLINE)
        assert old.close_code == 4409
        await new.close()
        received = [await next_of_type(other, "joined", "away", "left") for _ in range(4)]
        assert [(event["type"], event["who"]["name"]) for event in received] == [
            ("joined", "Ben"),
            ("joined", "Ann"),
            ("away", "Ann"),
            ("left", "Ann"),
        ]


async def test_resumed_tab_gets_messages_of_outage(address: str) -> None:
    """Messages of an outage arrive once after the reconnect, and the room gets `away` and `back`."""
    port = int(address.rpartition(":")[2])
    async with CuttingProxy(port) as proxy, connect(f"ws://{address}/ws/other?name=Ben") as other:
        async with connect_client(f"ws://127.0.0.1:{proxy.port}/ws/tab-1?name=Ann") as client:
            received: list[str] = []

            @client.on("said")
            def said(data: dict[str, str]) -> None:
                received.append(data["text"])

            while (await next_of_type(other, "joined"))["who"]["name"] != "Ann":
                pass
            proxy.rejects = True
            proxy.streams[-1].cut()
            assert (await next_of_type(other, "away"))["who"]["name"] == "Ann"
            for number in range(5):
                await other.send(json.dumps({"type": "say", "text": f"missed {number}"}))
            proxy.rejects = False
            assert (await next_of_type(other, "back"))["who"]["name"] == "Ann"
            await client.send({"text": "I am back"}, event="say")
            await until(lambda: len(received) == 6, DEADLINE)
            assert received == [*(f"missed {number}" for number in range(5)), "I am back"]


async def test_long_chat_name_is_rejected_with_close_code(address: str) -> None:
    """A name that is too long is rejected with a close code that a browser can read."""
    async with connect(f"ws://{address}/ws/tab-1?name={'n' * 25}") as client:
        await asyncio.wait_for(client.wait_closed(), DEADLINE)
        assert client.close_code == 4400


async def test_chat_page_loads_no_external_resources(address: str) -> None:
    """GET / returns a single page without external resources."""

    def get() -> tuple[str, str]:
        with urllib.request.urlopen(f"http://{address}/", timeout=DEADLINE) as response:
            return response.headers["content-type"], response.read().decode()

    content_type, page = await asyncio.to_thread(get)
    assert content_type.startswith("text/html")
    assert "<title>Chat</title>" in page
    assert "src=" not in page
    assert "@import" not in page
    assert "https://" not in page
