"""Tests of the golden vectors: this server behaves as they require of clients and servers in other languages."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import HTTPException, WebSocketException

from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.errors import RequestError
from fastapi_ws_stabilizer.manager import WebSocketConnectionManager
from fastapi_ws_stabilizer.socket import StableSocket
from fastapi_ws_stabilizer.wire.v1.frames import (
    SUBPROTOCOL,
    ProtocolError,
    control_frame,
    envelope,
    message_of,
    optional_int,
    optional_text,
    parse,
    require_int,
)
from fastapi_ws_stabilizer.wire.v1.hello import parse_hello
from tests.support.fake_link import Scene, virtually
from tests.support.fake_websocket import FakeServer, with_deadline
from tests.support.virtual_time import run_virtually

VECTORS = Path(__file__).parents[2] / "vectors"
FRAMES = json.loads((VECTORS / "frames.json").read_text(encoding="utf-8"))
CONVERSATIONS = json.loads((VECTORS / "conversations.json").read_text(encoding="utf-8"))
NUMBERS = ("seq", "ack", "ping", "timeout")


def by_name(vectors: list[dict[str, Any]]) -> Any:
    """Return one parameter set for each vector."""
    return pytest.mark.parametrize("vector", vectors, ids=[vector["name"] for vector in vectors])


def bytes_in(value: Any) -> Any:
    """Return the bytes that a vector writes as base64; other values unchanged."""
    return base64.b64decode(value["$base64"]) if isinstance(value, dict) and "$base64" in value else value


def wire_of(vector: dict[str, Any]) -> str | bytes:
    """Return a frame in its wire format."""
    return base64.b64decode(vector["wire"]) if vector.get("binary") else vector["wire"]


def read(direction: str, raw: str | bytes) -> dict[str, Any]:
    """Parse a frame with all of its fields, as its receiver does."""
    frame = parse(raw)
    kind, of_client = frame["type"], direction == "client"
    if kind == "hello":
        parse_hello(raw)
    elif kind == "msg":
        message_of(frame)
    elif kind == "reply":
        optional_text(frame, "re")
        if of_client:
            require_int(frame, "seq", least=1)
    elif kind == "welcome":
        for name in NUMBERS:
            require_int(frame, name)
        if optional_text(frame, "token", 512) is None or frame["resume"] not in ("none", "full", "gap", "lost"):
            raise ProtocolError("no welcome")
    elif kind == "ack":
        require_int(frame, "seq")
    elif kind in ("ping", "pong"):
        optional_int(frame, "ack" if kind == "pong" else "seq")
    elif kind == "drain":
        require_int(frame, "after")
    elif kind == "auth" and of_client:
        optional_text(frame, "token", 8192)
    return frame


@by_name([vector for vector in FRAMES if vector["valid"]])
def test_valid_vector_frame_is_read(vector: dict[str, Any]) -> None:
    """A valid frame of the vectors is parsed to the values in them."""
    frame = vector["frame"]
    assert read(vector["direction"], wire_of(vector)) == {name: bytes_in(value) for name, value in frame.items()}


@by_name([vector for vector in FRAMES if not vector["valid"]])
def test_invalid_vector_frame_is_rejected_with_its_code(vector: dict[str, Any]) -> None:
    """A malformed frame of the vectors is rejected, and that of a client closes with the code in them."""
    with pytest.raises(ProtocolError) as caught:
        read(vector["direction"], wire_of(vector))
    if vector["direction"] == "client":
        assert caught.value.code == vector["close_code"]


@by_name([vector for vector in FRAMES if not vector["valid"] and vector["direction"] == "server"])
def test_invalid_server_frame_does_not_end_client(vector: dict[str, Any]) -> None:
    """The client skips the frame and continues, or requests a resynchronisation if it was the welcome."""

    @virtually
    async def play() -> None:
        async with Scene() as scene:
            if "close_code" not in vector:
                await scene.opened()
            await scene.link.say(wire_of(vector))
            assert scene.client.unreadable_frames == 1
            if "close_code" in vector:
                assert scene.link.closed is not None
                assert (scene.client.state, scene.link.closed[0]) == ("waiting", vector["close_code"])
            else:
                assert (scene.client.state, scene.link.closed) == ("open", None)

    play()


@by_name([vector for vector in FRAMES if vector["valid"] and vector["frame"]["type"] in ("msg", "reply")])
def test_written_frame_matches_vector(vector: dict[str, Any]) -> None:
    """Messages and replies that this library writes equal those of the vectors."""
    fields = {name: bytes_in(value) for name, value in vector["frame"].items() if value is not None}
    written = envelope(fields.pop("type"), fields.pop("data", None), **fields)
    expected = {"data": None, **{name: bytes_in(v) for name, v in vector["frame"].items() if v is not None}}
    assert parse(written) == expected
    assert isinstance(written, bytes) is bool(vector.get("binary"))


def test_vector_names_are_unique() -> None:
    """The name of a vector is unique."""
    for vectors in (FRAMES, CONVERSATIONS):
        names = [vector["name"] for vector in vectors]
        assert len(set(names)) == len(names)


# ── conversations ──


class Line:
    """One connection of a conversation, and how many of its frames were checked."""

    def __init__(self, serve: Callable[[Any], Any]) -> None:
        self.server = FakeServer(path_params={"client_id": "ann"}, subprotocols=[SUBPROTOCOL])
        self.task = asyncio.ensure_future(serve(self.server.websocket))
        self.seen = 0
        self.closed = False

    async def frame(self, wanted: str) -> dict[str, Any]:
        """Return the next frame of the server; skip acknowledgements that were not expected."""
        while True:
            await self.server.until(lambda: len(self.server.data) > self.seen)
            frame = parse(self.server.data[self.seen])
            self.seen += 1
            if frame["type"] == wanted or frame["type"] != "ack":
                return frame

    @property
    def unseen(self) -> list[dict[str, Any]]:
        """Frames of the server that no step has checked."""
        frames = [parse(raw) for raw in self.server.data[self.seen :]]
        return [frame for frame in frames if frame["type"] != "ack"]


class Play:
    """Player of the client, the network, the clock and the application of a conversation with the real server."""

    def __init__(self, options: dict[str, Any]) -> None:
        basis = {"heartbeat_interval": 25, "heartbeat_timeout": 20, "session_ttl": 120, "max_message_size": 65536}
        self.manager = WebSocketConnectionManager(WebSocketConfig(**{**basis, **options}))
        self.lines: list[Line] = []
        self.names: dict[str, Any] = {}
        self.socket: StableSocket | None = None
        self.request: asyncio.Task[Any] | None = None
        self.sending: asyncio.Task[None] | None = None
        self._handle()

    def _handle(self) -> None:
        manager = self.manager

        @manager.on_message("echo")
        async def echo(ws: StableSocket, data: Any) -> Any:
            return data

        @manager.on_message("bytes")
        async def back(ws: StableSocket, data: bytes) -> bytes:
            return data

        @manager.on_message("no")
        async def no(ws: StableSocket) -> None:
            raise RequestError("no", "never")

        @manager.on_message("note")
        async def note(ws: StableSocket) -> None:
            pass

        @manager.on_auth
        async def auth(ws: StableSocket, credential: str | None) -> float | None:
            if credential not in (None, "good", "short"):
                raise HTTPException(401)
            return 60.0 if credential == "short" else None

    async def _serve(self, websocket: Any) -> None:
        try:
            async with self.manager.serve(websocket) as socket:
                self.socket = socket
                await socket.run()
        except WebSocketException:
            pass

    async def run(self, steps: list[dict[str, Any]]) -> None:
        """Play all steps; afterwards no unchecked frame may be left."""
        try:
            for position, step in enumerate(steps):
                try:
                    await getattr(self, step["from"])(step)
                except AssertionError as error:
                    raise AssertionError(f"step {position}: {step}") from error
            await asyncio.sleep(0.5)
            for line in self.lines:
                assert line.unseen == []
                assert line.closed or line.server.close_frames == []
        finally:
            await self.manager.graceful_shutdown(1.0)
            await with_deadline(asyncio.gather(*(line.task for line in self.lines)))

    def _line(self, step: dict[str, Any]) -> Line:
        return self.lines[step.get("connection", len(self.lines)) - 1]

    async def client(self, step: dict[str, Any]) -> None:
        """Perform a step of the client."""
        if "open" in step:
            self.lines.append(Line(self._serve))
            server = self.lines[-1].server
            await server.until(lambda: server.taken)
            assert server.taken[0]["subprotocol"] == SUBPROTOCOL
            return
        line = self._line(step)
        if "close" in step:
            line.closed = True
            line.server.feed_disconnect(step["close"])
        elif "wire" in step:
            line.server.feed_text(step["wire"])
        else:
            frame = self._filled(step["frame"])
            if isinstance(data := bytes_in(frame.get("data")), bytes):
                fields = {name: value for name, value in frame.items() if name not in ("type", "data")}
                line.server.feed_bytes(envelope(frame["type"], data, **fields))
            else:
                line.server.feed_text(json.dumps(frame, separators=(",", ":")))
        await asyncio.sleep(0.001)  # of virtual time: all immediate consequences have happened by then

    async def server(self, step: dict[str, Any]) -> None:
        """Check a step of the server."""
        line = self._line(step)
        if "close" in step:
            await line.server.until(lambda: line.server.close_frames)
            assert line.server.close_frames[0][0] == step["close"]
            line.closed = True
            line.server.feed_disconnect(step["close"])
            return
        wanted = step["frame"]
        self._match(wanted, await line.frame(wanted["type"]))

    async def network(self, step: dict[str, Any]) -> None:
        """Break the connection."""
        line = self._line(step)
        line.closed = True
        line.server.feed_disconnect(1006)
        await asyncio.sleep(0.001)

    async def clock(self, step: dict[str, Any]) -> None:
        """Let time pass."""
        await asyncio.sleep(step["pass"] / 1000)

    async def application(self, step: dict[str, Any]) -> None:
        """Perform or check a step of the server's application."""
        assert self.socket is not None
        if step.get("ack"):
            self.sending = asyncio.ensure_future(self.socket.send(step["send"], ack=True))
            await asyncio.sleep(0.001)
        elif "acknowledged" in step:
            assert self.sending is not None
            await with_deadline(self.sending)
        elif "send" in step:
            data = bytes_in(step["send"])
            assert await self.manager.send_to_client("ann", data, volatile=step.get("volatile", False))
        elif "request" in step:
            asked = step["request"]
            self.request = asyncio.ensure_future(self.socket.request(asked["event"], asked["data"], timeout=60))
            await asyncio.sleep(0.001)
        elif "drain" in step:
            self.socket._connection.answer(control_frame("drain", **step["drain"]))
        elif "close" in step:
            await self.socket.close(step["close"])
        elif "answered" in step:
            assert self.request is not None
            assert await with_deadline(self.request) == step["answered"]
        else:
            assert self.request is not None
            with pytest.raises(RequestError) as caught:
                await with_deadline(self.request)
            assert {"code": caught.value.code, "message": caught.value.message} == step["refused"]

    # ── placeholders ──

    def _filled(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: self._filled(inner) for name, inner in value.items()}
        return self.names[value] if isinstance(value, str) and value.startswith("$") else value

    def _match(self, wanted: dict[str, Any], frame: dict[str, Any]) -> None:
        assert frame.keys() == wanted.keys(), frame
        for name, value in wanted.items():
            if isinstance(value, dict) and "$base64" not in value:
                self._match(value, frame[name])
            elif isinstance(value, str) and value.startswith("$"):
                if value != "$any":
                    assert self.names.setdefault(value, frame[name]) == frame[name]
            else:
                assert frame[name] == bytes_in(value), frame
        chosen = [value for name, value in self.names.items() if name.startswith("$token")]
        assert len(set(chosen)) == len(chosen), "every welcome has its own token"


@by_name(CONVERSATIONS)
def test_server_follows_conversation_vector(vector: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's frames and closes equal those of the vectors."""
    monkeypatch.setattr("fastapi_ws_stabilizer.hub.heartbeat.random.uniform", lambda _, most: most)

    async def play() -> None:
        await Play(vector.get("server", {})).run(vector["steps"])

    run_virtually(play())
