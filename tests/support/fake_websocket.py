"""A real `WebSocket` over a fake server side of a connection, which a test controls."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from starlette.websockets import WebSocket

T = TypeVar("T")

DEADLINE = 5.0
"""Deadline of a test's waits, in seconds."""


class FakeServer:
    """ASGI server of one connection: it feeds events, and takes messages at once, late or never.

    Attributes:
        websocket: The `WebSocket` for the application.
        offered: All messages that the application has begun to send.
        taken: Messages that were taken, including the handshake's answer.
    """

    def __init__(self, path: str = "/ws", *, query: str = "", app: Any = None, **scope: Any) -> None:
        self.offered: list[dict[str, Any]] = []
        self.taken: list[dict[str, Any]] = []
        self._events: asyncio.Queue[dict[str, Any] | Exception] = asyncio.Queue()
        self._may_send = asyncio.Event()
        self._may_send.set()
        self._failure: Exception | None = None
        self._something_happened = asyncio.Event()
        self.feed({"type": "websocket.connect"})
        full_scope = {
            "type": "websocket",
            "path": path,
            "query_string": query.encode(),
            "headers": [(b"host", b"testserver"), (b"cookie", b"taste=sweet")],
            "client": ("10.0.0.7", 4711),
            "server": ("testserver", 80),
            "scheme": "ws",
            "path_params": {},
            "app": app,
            "state": {},
            "extensions": {"websocket.http.response": {}},
            **scope,
        }
        self.websocket = WebSocket(full_scope, self.receive, self.send)

    # ── ASGI ──

    async def receive(self) -> dict[str, Any]:
        """Implement the ASGI `receive`."""
        event = await self._events.get()
        if isinstance(event, Exception):
            raise event
        return event

    async def send(self, message: Any) -> None:
        """Implement the ASGI `send`."""
        self.offered.append(message)
        self._something_happened.set()
        await self._may_send.wait()
        if self._failure is not None:
            raise self._failure
        self.taken.append(message)
        self._something_happened.set()

    # ── control by a test ──

    def feed(self, event: dict[str, Any] | Exception) -> None:
        """Let the application receive an event, or let its `receive` fail."""
        self._events.put_nowait(event)

    def feed_text(self, *texts: str) -> None:
        """Let the client send text messages."""
        for text in texts:
            self.feed({"type": "websocket.receive", "text": text})

    def feed_bytes(self, data: bytes) -> None:
        """Let the client send a binary message."""
        self.feed({"type": "websocket.receive", "bytes": data})

    def feed_disconnect(self, code: int = 1000, reason: str | None = "") -> None:
        """Let the client disconnect."""
        self.feed({"type": "websocket.disconnect", "code": code, "reason": reason})

    def block(self) -> None:
        """Take no message from now on."""
        self._may_send.clear()

    def release(self) -> None:
        """Take messages again."""
        self._may_send.set()

    def fail(self, error: Exception) -> None:
        """Reject every message from now on."""
        self._failure = error
        self._may_send.set()

    async def accepted(self) -> WebSocket:
        """Return the WebSocket after its handshake."""
        await self.websocket.accept()
        return self.websocket

    # ── observation by a test ──

    async def until(self, condition: Callable[[], Any]) -> None:
        """Wait until a message makes `condition` true."""
        await with_deadline(self._until(condition))

    async def _until(self, condition: Callable[[], Any]) -> None:
        while not condition():
            self._something_happened.clear()
            await self._something_happened.wait()

    @property
    def data(self) -> list[str | bytes]:
        """The texts and bytes that were taken."""
        frames = [message for message in self.taken if message["type"] == "websocket.send"]
        return [frame["text"] if frame.get("text") is not None else frame["bytes"] for frame in frames]

    @property
    def json(self) -> list[Any]:
        """The JSON values in the texts that were taken."""
        return [json.loads(data) for data in self.data]

    @property
    def close_frames(self) -> list[tuple[int, str]]:
        """Code and reason of the close frames that were taken."""
        return [(m["code"], m["reason"]) for m in self.taken if m["type"] == "websocket.close"]


async def with_deadline(awaitable: Awaitable[T]) -> T:
    """Wait for something that has to happen soon; fail after the deadline, without cancelling it."""
    future = asyncio.ensure_future(awaitable)
    done, _ = await asyncio.wait({future}, timeout=DEADLINE)
    if not done:
        raise AssertionError(f"not done within {DEADLINE} s: {awaitable!r}")
    return future.result()


async def eventually(condition: Callable[[], Any]) -> None:
    """Run the event loop until `condition` is true, or fail at the deadline."""

    deadline = asyncio.get_running_loop().time() + DEADLINE
    while not condition():
        if asyncio.get_running_loop().time() > deadline:
            raise AssertionError(f"not true within {DEADLINE} s")
        await asyncio.sleep(0)


async def settle(turns: int = 20) -> None:
    """Run everything that is ready."""
    for _ in range(turns):
        await asyncio.sleep(0)
