"""A network between real clients and real servers that loses, delays and cuts, decided by the dice of one seed."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.websockets import WebSocket

from fastapi_ws_stabilizer.client import TransportClosedError
from fastapi_ws_stabilizer.wire.v1.frames import SUBPROTOCOL

Serve = Callable[[WebSocket], Any]


@dataclass
class Direction:
    """One direction of a link: first in, first out, with latency, until it is cut.

    Attributes:
        dead: Whether nothing arrives any more.
    """

    loop: asyncio.AbstractEventLoop
    latency: Callable[[], float]
    dead: bool = False
    _next: float = 0.0

    def carry(self, arrive: Callable[[], None]) -> None:
        """Deliver something, after everything that was sent before."""
        if self.dead:
            return
        self._next = max(self._next + 1e-6, self.loop.time() + self.latency())  # equal times keep no order
        self.loop.call_at(self._next, lambda: None if self.dead else arrive())


class Link:
    """One WebSocket: the client's end is a `Transport`, the server's end an ASGI `receive` and `send`.

    Args:
        network: The network of the link.
    """

    subprotocol = SUBPROTOCOL
    compresses = False

    def __init__(self, network: Network) -> None:
        self.network = network
        loop = asyncio.get_running_loop()
        dice = network.dice
        slow_up = 1.5 if dice.random() < 0.15 else 0.06
        self.up = Direction(loop, lambda: 0.001 + dice.random() * slow_up)
        self.down = Direction(loop, lambda: 0.001 + dice.random() * 0.06)
        self._to_client: deque[str | bytes] = deque()
        self._client_lost: tuple[int, str] | None = None
        self._client_event = asyncio.Event()
        self._to_server: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._server_informed = False
        self.accepted: asyncio.Future[None] = loop.create_future()
        self._to_server.put_nowait({"type": "websocket.connect"})

    # ── the client's end ──

    async def send(self, message: str | bytes) -> None:
        """Implement `Transport.send`."""
        if self._client_lost is not None:
            raise TransportClosedError(*self._client_lost)
        kind = "text" if isinstance(message, str) else "bytes"
        self.up.carry(lambda: self._arrives({"type": "websocket.receive", kind: message}))

    async def receive(self) -> str | bytes:
        """Implement `Transport.receive`."""
        while not self._to_client:
            if self._client_lost is not None:
                raise TransportClosedError(*self._client_lost)
            self._client_event.clear()
            await self._client_event.wait()
        return self._to_client.popleft()

    async def close(self, code: int, reason: str) -> None:
        """Implement `Transport.close`."""
        self.up.carry(lambda: self.tell_server(code, reason))
        self.lose_client(1006)

    # ── the server's end ──

    async def asgi_receive(self) -> dict[str, Any]:
        """Implement the ASGI `receive`."""
        return await self._to_server.get()

    async def asgi_send(self, message: Any) -> None:
        """Implement the ASGI `send`."""
        kind = message["type"]
        if kind == "websocket.accept":
            self.down.carry(lambda: None if self.accepted.done() else self.accepted.set_result(None))
        elif kind == "websocket.send":
            text = message.get("text")
            data = message.get("bytes") if text is None else text
            self.down.carry(lambda: self._reaches_client(data))
        elif kind == "websocket.close":
            code, reason = message.get("code", 1000), message.get("reason") or ""
            self.down.carry(lambda: self.lose_client(code, reason))
            self.tell_server(code, reason)

    def _arrives(self, event: dict[str, Any]) -> None:
        if not self._server_informed:
            self._to_server.put_nowait(event)

    def _reaches_client(self, data: str | bytes) -> None:
        if self._client_lost is None:
            self._to_client.append(data)
            self._client_event.set()

    # ── faults ──

    def tell_server(self, code: int, reason: str = "") -> None:
        """Inform the server that the connection is lost."""
        if not self._server_informed:
            self._server_informed = True
            self._to_server.put_nowait({"type": "websocket.disconnect", "code": code, "reason": reason})

    def lose_client(self, code: int, reason: str = "") -> None:
        """Inform the client that the connection is lost."""
        if self._client_lost is None:
            self._client_lost = (code, reason)
            self._client_event.set()
            if not self.accepted.done():
                self.accepted.set_exception(TransportClosedError(code, reason))
                self.accepted.exception()


@dataclass
class Network:
    """Everything between the clients and the server.

    Attributes:
        dice: Source of all random decisions.
        serve: The server that takes new connections.
        faulty: Whether faults happen.
    """

    dice: random.Random
    serve: Serve
    faulty: bool = True
    links: list[Link] = field(default_factory=list)
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)

    async def dial(self, _: str, subprotocols: Sequence[str]) -> Link:
        """Implement `Connect`."""
        dice = self.dice
        if self.faulty and dice.random() < 0.2:
            await asyncio.sleep(0.005 + dice.random() * 0.05)
            raise TransportClosedError(1006, "refused")
        if self.faulty and dice.random() < 0.05:
            await asyncio.Event().wait()  # a black hole: nothing ever answers
        link = Link(self)
        self.links = [one for one in self.links if not one._server_informed] + [link]
        scope = {
            "type": "websocket",
            "path": "/ws/ann",
            "path_params": {"client_id": "ann"},
            "query_string": b"",
            "headers": [],
            "subprotocols": list(subprotocols),
            "state": {},
            "client": ("10.0.0.1", 1),
        }
        websocket = WebSocket(scope, link.asgi_receive, link.asgi_send)
        link.up.carry(lambda: self._hold(asyncio.ensure_future(self.serve(websocket))))
        if self.faulty:
            asyncio.get_running_loop().call_later(dice.random() * 6, self._break, link)
        await asyncio.shield(link.accepted)
        return link

    def _hold(self, task: asyncio.Task[Any]) -> None:
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def _break(self, link: Link) -> None:
        """Apply a random fault to a link."""
        kind = self.dice.random()
        if kind < 0.25:  # half-open: neither end is informed
            link.up.dead = link.down.dead = True
        elif kind < 0.5:  # the client notices, the server does not; what the client has sent still arrives
            link.down.dead = True
            link.lose_client(1006)
        elif kind < 0.7:  # the server notices, the client does not
            link.up.dead = True
            link.tell_server(1006)
        elif kind < 0.9:  # both notice
            link.up.dead = link.down.dead = True
            link.lose_client(1006)
            link.tell_server(1006)
        else:  # an intermediary closes it properly, with a hint
            code = 1011 if self.dice.random() < 0.5 else 4503
            reason = f"x; retry={int(self.dice.random() * 300)}"
            link.down.carry(lambda: link.lose_client(code, reason))
            link.tell_server(1006)
