"""A manager with recording hooks and handlers, and clients that a test controls, in virtual time."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any

from fastapi import HTTPException, WebSocketException

from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.manager import WebSocketConnectionManager
from fastapi_ws_stabilizer.socket import StableSocket
from fastapi_ws_stabilizer.wire.v1.frames import SUBPROTOCOL, parse
from fastapi_ws_stabilizer.wire.v1.hello import ResumeOutcome
from tests.support.fake_link import soon
from tests.support.fake_websocket import FakeServer, with_deadline
from tests.unit.conftest import EventRecorder

_instances = itertools.count(1)


class Stage:
    """A manager, and everything that its application has seen.

    Attributes:
        events: Calls of hooks, in order.
        notes: The data of all messages that were handled, in order.
        gate: Event that the handler of `wait` waits for.
        endpoint: The endpoint of all connections.
        rejection: Exception that the connect hook raises.
    """

    def __init__(self, **options: Any) -> None:
        self.manager = WebSocketConnectionManager(WebSocketConfig(**{"heartbeat_type": "off", **options}))
        self.heard = EventRecorder()
        self.manager.events.subscribe(self.heard)
        self.events: list[str] = []
        self.notes: list[Any] = []
        self.gate = asyncio.Event()
        self.endpoint: Callable[[StableSocket], Awaitable[None]] = lambda ws: ws.run()
        self.rejection: Exception | None = None
        self.lines: list[Line] = []
        self._note_hooks()
        self._handle()

    def _note_hooks(self) -> None:
        manager, events = self.manager, self.events

        @manager.on_connect
        async def connected(ws: StableSocket) -> None:
            events.append(f"connect {ws.client_id}")
            if self.rejection is not None:
                raise self.rejection

        @manager.on_resume
        async def resumed(ws: StableSocket, outcome: ResumeOutcome) -> None:
            events.append(f"resume {ws.client_id} {outcome.value}")

        @manager.on_disconnect
        async def disconnected(ws: StableSocket, reason: DisconnectReason) -> None:
            events.append(f"disconnect {ws.client_id} {reason.value}")

        @manager.on_session_end
        async def ended(ws: StableSocket, reason: DisconnectReason) -> None:
            events.append(f"session_end {ws.client_id} {reason.value}")

    def _handle(self) -> None:
        manager = self.manager

        @manager.on_message("note")
        async def note(ws: StableSocket, data: Any) -> None:
            self.notes.append(data)

        @manager.on_message("wait")
        async def wait(ws: StableSocket, data: Any) -> None:
            await self.gate.wait()
            self.notes.append(data)

        @manager.on_message("echo")
        async def echo(ws: StableSocket, data: Any) -> Any:
            self.notes.append(data)
            return data

        @manager.on_message("bug")
        async def bug(ws: StableSocket, data: Any) -> None:
            raise RuntimeError(data)

    async def __aenter__(self) -> Stage:
        await self.manager.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.gate.set()
        for line in self.lines:
            line.server.release()
        await self.manager.graceful_shutdown(1.0)
        await with_deadline(asyncio.gather(*(line.task for line in self.lines)))

    def plain(self, client_id: str | None = "ann", *, token: str | None = None) -> Line:
        """Connect a plain client."""
        return Line(self, client_id, query="" if token is None else f"token={token}")

    def socket(self, client_id: str = "ann") -> StableSocket:
        """Return the only open socket of a client."""
        (socket,) = self.manager.get_sockets(client_id)
        return socket

    @property
    def bugs(self) -> list[str]:
        """The events that were emitted with an error."""
        return [report.event for report in self.heard.all if report.error is not None]


class Line:
    """One connection.

    Attributes:
        socket: The socket of the endpoint.
        error: Exception that the endpoint raised.
    """

    def __init__(
        self,
        stage: Stage,
        client_id: str | None = "ann",
        *,
        query: str = "",
        subprotocols: tuple[str, ...] = (),
        **scope: Any,
    ) -> None:
        path_params = {} if client_id is None else {"client_id": client_id}
        self.server = FakeServer(path_params=path_params, query=query, subprotocols=list(subprotocols), **scope)
        self.socket: StableSocket | None = None
        self.error: Exception | None = None
        self._stage = stage
        self.task = asyncio.ensure_future(self._serve())
        stage.lines.append(self)

    async def _serve(self) -> None:
        try:
            async with self._stage.manager.serve(self.server.websocket) as self.socket:
                await self._stage.endpoint(self.socket)
        except (WebSocketException, HTTPException) as error:
            self.error = error

    async def say(self, *frames: dict[str, Any] | str) -> None:
        """Let the client send frames, and run everything that follows from them."""
        self.server.feed_text(*(json.dumps(frame) if isinstance(frame, dict) else frame for frame in frames))
        await soon()

    async def message(self, event: str, *data: Any, first: int = 1, **fields: Any) -> None:
        """Let the client send numbered messages."""
        numbered = [
            {"type": "msg", "seq": first + position, "event": event, "data": one} for position, one in enumerate(data)
        ]
        await self.say(*({**one, **fields} for one in numbered))

    async def leaves(self, code: int = 1006) -> None:
        """Let the connection break, or the client close it."""
        self.server.feed_disconnect(code)
        await soon()

    @property
    def frames(self) -> list[dict[str, Any]]:
        """Frames that the server has sent, without acknowledgements."""
        return [frame for frame in map(parse, self.server.data) if frame["type"] != "ack"]

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Return the frames of one type that the server has sent."""
        return [frame for frame in map(parse, self.server.data) if frame["type"] == kind]

    @property
    def got(self) -> list[Any]:
        """The data of the messages that the server has sent."""
        return [frame["data"] for frame in self.of("msg")]

    @property
    def welcome(self) -> dict[str, Any]:
        """The only welcome."""
        (welcome,) = self.of("welcome")
        return welcome

    @property
    def outcome(self) -> str:
        """The outcome of resuming, from the welcome."""
        outcome: str = self.welcome["resume"]
        return outcome

    @property
    def close_code(self) -> int | None:
        """The code of the server's close frame."""
        codes = [code for code, _ in self.server.close_frames]
        return codes[0] if codes else None


class Peer:
    """A client of `stabilizer.v1.json` that a test controls.

    Attributes:
        token: The token of its last welcome.
        dials: Number of its connections so far.
    """

    def __init__(self, stage: Stage, client_id: str | None = "ann", *, instance: str | None = None) -> None:
        self.stage = stage
        self.client_id = client_id
        self.instance = instance or f"instance {next(_instances)}"
        self.token: str | None = None
        self.dials = 0

    async def dial(
        self,
        seq: int = 0,
        *,
        auth: str | None = None,
        token: str | None = None,
        subprotocols: tuple[str, ...] = (SUBPROTOCOL,),
        caps: list[str] | None = None,
    ) -> Line:
        """Connect and send a hello, with the token of the last welcome."""
        self.dials += 1
        line = Line(self.stage, self.client_id, subprotocols=subprotocols)
        hello: dict[str, Any] = {"type": "hello", "v": 1, "n": self.dials, "client": self.instance}
        if caps is not None:
            hello["caps"] = caps
        if auth is not None:
            hello["auth"] = auth
        if token or self.token:
            hello["resume"] = {"token": token or self.token, "seq": seq}
        await line.say(hello)
        if line.of("welcome"):
            self.token = line.welcome["token"]
        return line
