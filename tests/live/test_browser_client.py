"""Script of the browser client in a headless Chromium. CI installs it; elsewhere the tests skip without it."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio

from fastapi_ws_stabilizer.client.backoff import ReconnectAction, action_for
from fastapi_ws_stabilizer.close_codes import SUPERSEDED
from tests.live.chromium import CHROMIUM, Browser, Page
from tests.support.faulty_proxy import CuttingProxy
from tests.support.server import LiveServer, until

pytestmark = pytest.mark.skipif(CHROMIUM is None and not os.environ.get("CI"), reason="chromium is not installed")

Serve = Callable[..., LiveServer]
APP = "tests.live.browser_app:app"
LOG = "window.states = []; window.messages = [];"
DIAL = """
import("/reconnecting_socket.js").then((module) => {
  window.socket = new module.ReconnectingSocket("/ws/ann", {
    onmessage: (message) => messages.push(message),
    onstate: (state, detail) => states.push([state, detail]),
    ...OPTIONS,
  });
})
"""


@pytest_asyncio.fixture
async def browser() -> AsyncIterator[Browser]:
    """Browser that is closed after the test."""
    async with Browser() as browser:
        yield browser


async def open_blank(browser: Browser, port: int) -> Page:
    """Open a page of the server that has no socket yet."""
    page = await browser.open(f"http://127.0.0.1:{port}/openapi.json")
    await page.run(LOG)
    return page


async def open_socket(page: Page, **options: Any) -> None:
    """Create the script's socket, and wait until it is open."""
    await page.run(DIAL.replace("OPTIONS", json.dumps(options)))
    await page.until("socket.state === 'open'")


async def states(page: Page) -> list[str]:
    """Return the states that the page received, in order."""
    return [state for state, _ in await page.run("states")]


async def test_page_goes_on_counting_after_the_network_was_cut(serve: Serve, browser: Browser) -> None:
    """The example page shows its state, reconnects with its token, and gets its user data back."""
    server = serve(app=APP)
    async with CuttingProxy(server.port) as proxy:
        page = await browser.open(f"http://127.0.0.1:{proxy.port}/")
        await page.until("document.getElementById('state').textContent === 'open'")
        await page.run("document.getElementById('click').click()")
        await page.until("document.getElementById('count').textContent === '1'")
        proxy.rejects = True
        for stream in list(proxy.streams):
            stream.cut()
        await page.until("document.getElementById('state').textContent.startsWith('lost (1006)')")
        assert await page.run("document.getElementById('click').disabled")
        proxy.rejects = False
        await page.until("document.getElementById('state').textContent === 'open'")
        await page.run("document.getElementById('click').click()")
        await page.until("document.getElementById('count').textContent === '2'")


async def test_silent_server_is_left_for_a_new_connection(serve: Serve, browser: Browser) -> None:
    """The page's own ping detects a network that swallows everything, and user data is restored."""
    server = serve(app=APP)
    async with CuttingProxy(server.port) as proxy:
        page = await open_blank(browser, proxy.port)
        await open_socket(page, pingInterval=200, pingTimeout=1000)
        await page.run("socket.send({type: 'click'})")
        await page.until("messages.length === 2")
        for stream in list(proxy.streams):
            stream.swallow()
        await page.until("states.filter(([state]) => state === 'open').length === 2")
        assert await states(page) == ["connecting", "open", "waiting", "connecting", "open"]
        lost: dict[str, Any] = await page.run("states[2][1]")
        assert (lost["code"], lost["reason"]) == (4408, "no answer")
        assert 200 <= lost["delay"] <= 1200
        await page.until("messages.length === 3")
        assert await page.run("messages.map((message) => message.count)") == [0, 1, 1]


async def test_page_answers_pings_and_obeys_close_codes(serve: Serve, browser: Browser) -> None:
    """The page answers heartbeats, reconnects after the hint of a retryable code, and stops after a final code."""
    server = serve(app=APP, config={"heartbeat_interval": 0.2, "heartbeat_timeout": 1.0, "require_pong": True})
    page = await open_blank(browser, server.port)
    await open_socket(page)
    await asyncio.sleep(2.0)
    assert await states(page) == ["connecting", "open"]
    (client,) = await asyncio.to_thread(server.get, "/clients")
    assert client["client"] == "ann"
    assert client["rtt"] > 0

    await asyncio.to_thread(server.post, "/close", {"code": 4429, "reason": "slow down; retry=300"})
    await page.until("states.filter(([state]) => state === 'open').length === 2")
    waited: dict[str, Any] = await page.run("states[2][1]")
    assert (waited["code"], waited["reason"]) == (4429, "slow down; retry=300")
    assert 300 <= waited["delay"] <= 530

    await asyncio.to_thread(server.post, "/close", {"code": 4403, "reason": "kicked"})
    assert await page.until("socket.state === 'closed' && states.at(-1)[1]") == {"code": 4403, "reason": "kicked"}
    await until(lambda: server.get("/clients") == [])
    await page.run("dispatchEvent(new Event('online'))")
    await asyncio.sleep(1.5)
    assert await page.run("socket.state") == "closed"
    assert server.get("/clients") == []
    assert not await page.run("socket.send('hello')")


async def test_final_codes_and_delays_are_those_of_the_python_client(serve: Serve, browser: Browser) -> None:
    """A page stops where the Python client stops, and where it would need a new login or another session."""
    server = serve(app=APP)
    page = await open_blank(browser, server.port)
    await page.run('import("/reconnecting_socket.js").then((module) => { window.script = module; })')
    codes = [*range(1000, 1016), *range(3000, 5000)]
    final = await page.run(f"{json.dumps(codes)}.filter(script.isFinal)")
    stop = (ReconnectAction.STOP, ReconnectAction.REAUTHENTICATE)
    assert final == [code for code in codes if action_for(code) in stop or code in (1000, SUPERSEDED)]

    delays = await page.run("[0, 1, 2, 9].map((n) => [0, 0.999].map((r) => script.delayFor(n, 1006, '', () => r)))")
    assert [[round(one) for one in pair] for pair in delays] == [[200, 1199], [200, 2198], [200, 4196], [200, 30170]]
    assert await page.run("script.delayFor(0, 1012, '', () => 1)") == 5200
    assert await page.run("script.delayFor(2, 1012, 'draining; retry=3471', () => 0)") == 3471
    assert await page.run("script.delayFor(3, 1012, 'draining; retry=3471', () => 0)") == 200
    assert await page.run("script.delayFor(9, 4429, 'retry=60000', () => 1)") == 66200
    assert await page.run("script.delayFor(9, 4429, 'retry=0', () => 0)") == 200
