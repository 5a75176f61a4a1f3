"""The network and the server of a client, both played by a test, in virtual time."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Callable, Coroutine, Sequence
from types import TracebackType
from typing import Any

from fastapi_ws_stabilizer.client import Client, TransportClosedError
from fastapi_ws_stabilizer.wire.v1.frames import SUBPROTOCOL, parse
from tests.support.virtual_time import run_virtually


def virtually(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test in virtual time: a minute passes at once."""

    @functools.wraps(test)
    def run(*args: Any, **options: Any) -> None:
        run_virtually(test(*args, **options))

    return run


async def soon() -> None:
    """Run everything that is ready, until a virtual millisecond has passed."""
    await asyncio.sleep(0.001)


class FakeLink:
    """One connection, as a client's `Transport`.

    Attributes:
        sent: Frames that the client has sent.
        closed: Code and reason of the client's close frame.
        broken: Whether sends fail although the connection was not reported lost.
        came: Bytes received so far, and the time of the last one.
        taken: Bytes that the server's machine has acknowledged; `None` if unknown.
    """

    def __init__(self, subprotocol: str | None) -> None:
        self.subprotocol = subprotocol
        self.compresses = False
        self.sent: list[dict[str, Any]] = []
        self.raw: list[str | bytes] = []
        self.closed: tuple[int, str] | None = None
        self.broken = False
        self.came = (0, 0.0)
        self.taken: int | None = None
        self.may_send = asyncio.Event()
        self.may_send.set()
        self.may_close = asyncio.Event()
        self.may_close.set()
        self._incoming: asyncio.Queue[str | bytes | Exception] = asyncio.Queue()
        self._lost: TransportClosedError | None = None

    # ── Transport ──

    async def send(self, message: str | bytes) -> None:
        """Implement `Transport.send`."""
        await self.may_send.wait()
        if self._lost is not None or self.broken:
            raise self._lost or TransportClosedError(1006, "broken pipe")
        self.raw.append(message)
        self.sent.append(parse(message))

    async def receive(self) -> str | bytes:
        """Implement `Transport.receive`."""
        message = await self._incoming.get()
        if isinstance(message, Exception):
            raise message
        return message

    async def close(self, code: int, reason: str) -> None:
        """Implement `Transport.close`."""
        self.closed = (code, reason)
        await self.may_close.wait()
        self.lose(1006)

    def received(self) -> tuple[int, float]:
        """Implement `Transport.received`."""
        return self.came

    def send_progress(self) -> int | None:
        """Implement `Transport.send_progress`."""
        return self.taken

    # ── actions of the server ──

    async def trickle(self, count: int, seconds: float) -> None:
        """Receive bytes of an incomplete message, some each second."""
        began = asyncio.get_running_loop().time()
        for second in range(1, int(seconds) + 1):
            await asyncio.sleep(began + second - asyncio.get_running_loop().time())
            self.came = (self.came[0] + int(count // seconds), asyncio.get_running_loop().time())

    async def say(self, *frames: dict[str, Any] | str | bytes) -> None:
        """Send frames to the client, and let it process them."""
        for frame in frames:
            self._incoming.put_nowait(json.dumps(frame) if isinstance(frame, dict) else frame)
        await soon()

    async def welcome(self, resume: str = "none", **fields: Any) -> None:
        """Send a welcome to the client."""
        defaults = {"session": "s", "token": "s.token", "seq": 0, "ack": 0, "ping": 25_000, "timeout": 20_000}
        more = {"ttl": 120_000, "max": 1_000_000, "caps": []}
        await self.say({"type": "welcome", "v": 1, "resume": resume, **defaults, **more, **fields})

    def lose(self, code: int, reason: str = "") -> None:
        """Lose the connection."""
        if self._lost is None:
            self._lost = TransportClosedError(code, reason)
            self._incoming.put_nowait(self._lost)

    async def closes(self, code: int, reason: str = "") -> None:
        """Lose the connection, and let the client process it."""
        self.lose(code, reason)
        await soon()

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Return the frames of one type that the client has sent."""
        return [frame for frame in self.sent if frame["type"] == kind]

    @property
    def hello(self) -> dict[str, Any]:
        """The first frame of the client."""
        assert self.sent[0]["type"] == "hello"
        return self.sent[0]


class Scene:
    """A client, and everything that happens to it.

    Attributes:
        links: The connections that were made.
        dials: Times of all attempts to connect, including those that failed.
        failures: Errors of the next attempts.
        heard: Events of the client's listeners, in order.
    """

    def __init__(self, **options: Any) -> None:
        self.links: list[FakeLink] = []
        self.dials: list[float] = []
        self.offers: list[tuple[str, list[str]]] = []
        self.failures: list[Exception] = []
        self.black_hole = False
        self.subprotocol: str | None = SUBPROTOCOL
        self.heard: list[tuple[Any, ...]] = []
        self.client = Client(options.pop("url", "ws://server/ws"), dial=self._dial, **options)
        self.client.on_open(lambda outcome: self.heard.append(("open", outcome)))
        self.client.on_gap(lambda gap: self.heard.append(("gap", gap)))
        self.client.on_close(lambda code, reason: self.heard.append(("close", code, reason)))
        self.client.on_drain(lambda after, within: self.heard.append(("drain", after, within)))
        self.client.on_error(lambda error: self.heard.append(("error", error)))

    async def _dial(self, url: str, subprotocols: Sequence[str]) -> FakeLink:
        self.dials.append(asyncio.get_running_loop().time())
        self.offers.append((url, list(subprotocols)))
        if self.failures:
            raise self.failures.pop(0)
        if self.black_hole:
            await asyncio.Event().wait()
        self.links.append(FakeLink(self.subprotocol))
        return self.links[-1]

    async def __aenter__(self) -> Scene:
        self.client.start()
        await soon()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for link in self.links:
            link.may_send.set()
            link.may_close.set()
        await self.client.close()

    @property
    def link(self) -> FakeLink:
        """The newest connection."""
        return self.links[-1]

    def of(self, name: str) -> list[Any]:
        """Return the arguments of one event's listeners; a single argument without its tuple."""
        return [fields[0] if len(fields) == 1 else tuple(fields) for event, *fields in self.heard if event == name]

    async def opened(self, **options: Any) -> FakeLink:
        """Welcome the client on its first connection."""
        await self.link.welcome(**options)
        assert self.client.state == "open"
        return self.link

    async def redialled(self, count: int = 2) -> FakeLink:
        """Return the connection after `count - 1` others, as soon as it is made."""
        for _ in range(4000):
            if len(self.links) >= count:
                await soon()
                return self.links[count - 1]
            await asyncio.sleep(0.05)
        raise AssertionError("the client has not reconnected")
