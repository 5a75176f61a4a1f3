"""Messages of an endpoint arrive while the endpoint goes on computing."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import connect

from fastapi_ws_stabilizer.client import connect as connect_client
from tests.live.computing import STEPS
from tests.support.server import SERVERS

CALLS = (
    "send",
    "send_json",
    "send_text",
    "send_bytes",
    "keyed",
    "volatile",
    "to_client",
    "two",
    "after broadcast",
    "websocket",
    "history",
)


async def read_steps(messages: Any, folder: Path) -> None:
    """Read all steps, and after each one release the computation that follows it."""
    for step in range(STEPS):
        while True:
            message = await asyncio.wait_for(messages(), 20)
            if "step" in message:
                break
        assert message["step"] == step
        (folder / str(step)).touch()
    assert not (folder / "late").exists()


@pytest.fixture
def computing(serve: Any, tmp_path: Path) -> Any:
    """Return a function that starts the server of these tests."""

    def start(kind: str) -> Any:
        return serve(kind, app="tests.live.computing_app:app", env={"COMPUTING_FOLDER": str(tmp_path)})

    return start


@pytest.mark.parametrize("route", ["endpoint", "handler", "adopt"])
@pytest.mark.parametrize("kind", SERVERS)
async def test_sent_message_leaves_before_following_computation(
    computing: Any, tmp_path: Path, kind: str, route: str
) -> None:
    """A message arrives while the endpoint or handler that sent it computes without an await."""
    server = computing(kind)
    async with connect(server.url(f"/{route}/ann?call=send")) as ws:
        if route == "handler":
            await ws.send('{"type":"speak","call":"send"}')

        async def receive() -> Any:
            return json.loads(await ws.recv())

        await read_steps(receive, tmp_path)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("protocol", ["plain", "v1"])
@pytest.mark.parametrize("kind", ["uvicorn-sansio", "uvicorn-stable"])
async def test_each_send_call_leaves_before_following_computation(
    computing: Any, tmp_path: Path, kind: str, protocol: str, call: str
) -> None:
    """Each call that sends to the same client, with and without a session, sends at once and in order."""
    server = computing(kind)
    url = server.url(f"/endpoint/ann?call={call.replace(' ', '%20')}")
    if protocol == "plain":
        async with connect(url) as ws:

            async def receive() -> Any:
                return json.loads(await ws.recv())

            await read_steps(receive, tmp_path)
    else:
        async with connect_client(url) as client:

            async def receive_data() -> Any:
                data = (await anext(client)).data
                return json.loads(data) if isinstance(data, (bytes, str)) else data

            await read_steps(receive_data, tmp_path)


@pytest.mark.parametrize("kind", ["uvicorn-sansio", "uvicorn-stable"])
async def test_reply_leaves_before_next_request_is_handled(computing: Any, tmp_path: Path, kind: str) -> None:
    """The reply to a request arrives while the handler of the next request computes."""
    server = computing(kind)
    async with connect_client(server.url("/handler/ann")) as client:

        async def ask(step: int) -> None:
            assert await client.request("ask", {"step": step}, timeout=20) == {"step": step}
            (tmp_path / str(step)).touch()

        await asyncio.gather(*(ask(step) for step in range(STEPS)))
    assert not (tmp_path / "late").exists()
