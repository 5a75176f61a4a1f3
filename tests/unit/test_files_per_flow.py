"""Number of files of the package that each of the main flows passes through.

A file that joins a flow has to be worth the jump. A number is lowered when a flow gets shorter, and never raised.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from fastapi import Depends, FastAPI

import fastapi_ws_stabilizer
from fastapi_ws_stabilizer import (
    ResumeOutcome,
    StableSocket,
    WebSocketConfig,
    WebSocketConnectionManager,
    stable_socket,
)
from fastapi_ws_stabilizer.tasks import wait_for_all

PACKAGE = f"{Path(fastapi_ws_stabilizer.__file__).parent}/"
SUBPROTOCOL = "stabilizer.v1.json"

FILES = {
    "handshake": 27,
    "message": 7,
    "pong": 4,
    "v1 pong": 9,
    "broadcast": 8,
    "v1 broadcast": 11,
    "resume": 47,
    "drain": 42,
}
"""Files per flow, on plain ASGI. The targets are 22, 7, 4, 7, 8, 8, 32 and 32."""


CONFIG: dict[str, Any] = {
    "drain_window": 0.0,
    "log_level": "CRITICAL",
    "heartbeat_interval": 1e6,  # no ping at a random moment joins a flow
    "heartbeat_timeout": 1e6,
}


class Tracer:
    """Records the files of the package that are entered while it is on."""

    def __init__(self) -> None:
        self.files: set[str] = set()

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(PACKAGE):
            self.files.add(name[len(PACKAGE) :])


class Peer:
    """A client on plain ASGI, without a server."""

    def __init__(self, app: FastAPI, path: str, subprotocols: tuple[str, ...] = ()) -> None:
        self.sent: list[dict[str, Any]] = []
        self._events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._events.put_nowait({"type": "websocket.connect"})
        scope = {
            "type": "websocket",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "scheme": "ws",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"host", b"server")],
            "client": ("192.0.2.1", 1),
            "server": ("server", 80),
            "subprotocols": list(subprotocols),
            "state": {},
            "extensions": {"websocket.http.response": {}},
        }
        self.task = asyncio.create_task(app(scope, self._events.get, self._send))

    async def _send(self, message: Any) -> None:
        self.sent.append(dict(message))

    def feed(self, text: str) -> None:
        """Send a text message."""
        self._events.put_nowait({"type": "websocket.receive", "text": text})

    def lose(self) -> None:
        """Lose the network."""
        self._events.put_nowait({"type": "websocket.disconnect", "code": 1006})

    async def until(self, kind: str, part: str = "") -> dict[str, Any]:
        """Wait for a message of the server."""
        for _ in range(2000):
            for message in self.sent:
                if message["type"] == kind and part in (message.get("text") or ""):
                    return message
            await asyncio.sleep(0)
        raise AssertionError(f"no {kind} with {part!r} among {self.sent}")


async def settle() -> None:
    """Let everything run that can run."""
    for _ in range(60):
        await asyncio.sleep(0)


class Flows:
    """An app with every hook, and the flows through it."""

    def __init__(self) -> None:
        self.manager = WebSocketConnectionManager(WebSocketConfig(**CONFIG))
        self.app = FastAPI(lifespan=self.manager.lifespan)
        self.tracer = Tracer()
        self._stop_at = ""
        stop = self._stop

        @self.manager.on_connect
        async def connected(ws: StableSocket) -> None:
            stop("connect")
            await ws.join("lounge")

        @self.manager.on_resume
        async def resumed(ws: StableSocket, outcome: ResumeOutcome) -> None:
            stop("resume")

        @self.manager.on_disconnect
        async def disconnected(ws: StableSocket) -> None:
            pass

        @self.manager.on_message("say")
        async def say(ws: StableSocket, message: dict[str, Any]) -> None:
            stop("say")

        @self.app.websocket("/ws/{client_id}")
        async def endpoint(ws: StableSocket = Depends(stable_socket)) -> None:
            await ws.run()

    def _stop(self, name: str) -> None:
        if name == self._stop_at:
            sys.setprofile(None)

    @contextlib.contextmanager
    def traced(self, stop_at: str = "") -> Iterator[None]:
        """Record a flow, up to a hook or handler if one is named."""
        self._stop_at = stop_at
        gc.disable()  # a collection calls `gc_pacing.py` at any moment, which is no part of a flow
        sys.setprofile(self.tracer)
        try:
            yield
        finally:
            sys.setprofile(None)
            gc.enable()

    async def connect(self, path: str, *subprotocols: str) -> Peer:
        """Connect, and wait for the accept."""
        peer = Peer(self.app, path, subprotocols)
        await peer.until("websocket.accept")
        return peer

    async def connect_v1(self, **resume: Any) -> tuple[Peer, dict[str, Any]]:
        """Connect a `stabilizer.v1.json` client, and return its welcome."""
        peer = await self.connect("/ws/vic", SUBPROTOCOL)
        peer.feed(json.dumps({"type": "hello", "v": 1, "n": 2 if resume else 1, "client": "i1", **resume}))
        welcome = await peer.until("websocket.send", "welcome")
        return peer, json.loads(welcome["text"])


async def handshake(flows: Flows) -> None:
    with flows.traced("connect"):
        await flows.connect("/ws/ann")
        await settle()


async def message(flows: Flows) -> None:
    peer = await flows.connect("/ws/ann")
    await settle()
    with flows.traced("say"):
        peer.feed(json.dumps({"type": "say", "text": "longer than a ping, so that no ping is looked for " * 2}))
        await settle()


async def pong(flows: Flows) -> None:
    peer = await flows.connect("/ws/ann")
    await settle()
    with flows.traced():
        peer.feed("pong")
        await settle()


async def v1_pong(flows: Flows) -> None:
    peer, _ = await flows.connect_v1()
    peer.feed('{"type":"ack","seq":0}')
    await settle()
    with flows.traced():
        peer.feed('{"type":"pong","ack":0}')
        await settle()


async def broadcast(flows: Flows) -> None:
    peers = [await flows.connect("/ws/ann"), await flows.connect("/ws/bob")]
    await settle()
    with flows.traced():
        await flows.manager.broadcast({"x": 1}, room="lounge")
        for peer in peers:
            await peer.until("websocket.send")


async def v1_broadcast(flows: Flows) -> None:
    plain = [await flows.connect("/ws/ann"), await flows.connect("/ws/bob")]
    session, _ = await flows.connect_v1()
    session.feed('{"type":"ack","seq":0}')
    await settle()
    with flows.traced():
        await flows.manager.broadcast({"x": 2}, room="lounge")
        for peer in (*plain, session):
            await peer.until("websocket.send", '"x":2')
        await settle()


async def resume(flows: Flows) -> None:
    peer, welcome = await flows.connect_v1()
    peer.feed('{"type":"ack","seq":0}')
    await settle()
    await flows.manager.broadcast({"x": 1}, room="lounge")
    await settle()
    peer.lose()
    await settle()
    with flows.traced("resume"):
        await flows.connect_v1(resume={"token": welcome["token"], "seq": 0})
        await settle()


async def drain(flows: Flows) -> None:
    await flows.connect("/ws/ann")
    await flows.connect("/ws/bob")
    await flows.connect_v1()
    await settle()
    with flows.traced():
        await flows.manager.drain(5.0)


FLOWS: dict[str, Callable[[Flows], Any]] = {
    "handshake": handshake,
    "message": message,
    "pong": pong,
    "v1 pong": v1_pong,
    "broadcast": broadcast,
    "v1 broadcast": v1_broadcast,
    "resume": resume,
    "drain": drain,
}


@pytest.fixture
async def flows() -> AsyncIterator[Flows]:
    """A running app whose first handshake is done: what runs once is not part of a flow."""
    made = Flows()
    async with made.app.router.lifespan_context(made.app):
        await made.connect("/ws/warm")
        await settle()
        yield made
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    await wait_for_all(tasks, 5.0)


@pytest.mark.parametrize("flow", FLOWS)
async def test_flow_passes_through_known_number_of_files(flows: Flows, flow: str) -> None:
    """A flow enters exactly the number of files that is written here: a shorter flow lowers it, and none raises it."""
    await FLOWS[flow](flows)
    files = sorted(flows.tracer.files)
    assert len(files) <= FILES[flow], f"{flow} passes through {len(files)} files, more than {FILES[flow]}: {files}"
    if sys.version_info < (3, 12):  # later, a comprehension is no call, so a file can be entered without a call
        assert len(files) == FILES[flow], f"{flow} passes through fewer files: lower its number to {len(files)}"
