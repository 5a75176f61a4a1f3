"""The network and the server of a client, both played by a test, on a clock that does not wait."""

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
    """Run an async test on a loop whose clock jumps: what takes a minute takes none."""

    @functools.wraps(test)
    def run(*args: Any, **options: Any) -> None:
        run_virtually(test(*args, **options))

    return run


async def soon() -> None:
    """Let everything happen that is ready to happen: a virtual millisecond passes when nothing is left to do."""
    await asyncio.sleep(0.001)


class FakeLink:
    """One connection, as a client's `Transport`.

    Attributes:
        sent: What the client has sent.
        closed: The close frame of the client.
        broken: Whether nothing can be sent, though nothing says that it is over.
        came: Bytes that have come in so far, and when the last came.
        taken: What the server's machine has taken; `None` if that is not known.
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

    # ── as a transport ──

    async def send(self, message: str | bytes) -> None:
        """As `Transport`."""
        await self.may_send.wait()
        if self._lost is not None or self.broken:
            raise self._lost or TransportClosedError(1006, "broken pipe")
        self.raw.append(message)
        self.sent.append(parse(message))

    async def receive(self) -> str | bytes:
        """As `Transport`."""
        message = await self._incoming.get()
        if isinstance(message, Exception):
            raise message
        return message

    async def close(self, code: int, reason: str) -> None:
        """As `Transport`."""
        self.closed = (code, reason)
        await self.may_close.wait()
        self.lose(1006)

    def received(self) -> tuple[int, float]:
        """As `Transport`."""
        return self.came

    def send_progress(self) -> int | None:
        """As `Transport`."""
        return self.taken

    # ── what the server does ──

    async def trickle(self, count: int, seconds: float) -> None:
        """Let so many bytes of an incomplete message come in, some each second."""
        began = asyncio.get_running_loop().time()
        for second in range(1, int(seconds) + 1):
            await asyncio.sleep(began + second - asyncio.get_running_loop().time())
            self.came = (self.came[0] + int(count // seconds), asyncio.get_running_loop().time())

    async def say(self, *frames: dict[str, Any] | str | bytes) -> None:
        """Send frames to the client, and let it deal with them."""
        for frame in frames:
            self._incoming.put_nowait(json.dumps(frame) if isinstance(frame, dict) else frame)
        await soon()

    async def welcome(self, resume: str = "none", **fields: Any) -> None:
        """Welcome the client."""
        defaults = {"session": "s", "token": "s.token", "seq": 0, "ack": 0, "ping": 25_000, "timeout": 20_000}
        more = {"ttl": 120_000, "max": 1_000_000, "caps": []}
        await self.say({"type": "welcome", "v": 1, "resume": resume, **defaults, **more, **fields})

    def lose(self, code: int, reason: str = "") -> None:
        """End the connection."""
        if self._lost is None:
            self._lost = TransportClosedError(code, reason)
            self._incoming.put_nowait(self._lost)

    async def closes(self, code: int, reason: str = "") -> None:
        """End the connection, and let the client deal with it."""
        self.lose(code, reason)
        await soon()

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The frames of one type that the client has sent."""
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
        dials: When each of them was dialled, those that failed included.
        failures: What the next dials end with.
        told: What the listeners were told, in order.
    """

    def __init__(self, **options: Any) -> None:
        self.links: list[FakeLink] = []
        self.dials: list[float] = []
        self.offers: list[tuple[str, list[str]]] = []
        self.failures: list[Exception] = []
        self.black_hole = False
        self.subprotocol: str | None = SUBPROTOCOL
        self.told: list[tuple[Any, ...]] = []
        self.client = Client(options.pop("url", "ws://server/ws"), dial=self._dial, **options)
        self.client.on_open(lambda outcome: self.told.append(("open", outcome)))
        self.client.on_gap(lambda gap: self.told.append(("gap", gap)))
        self.client.on_close(lambda code, reason: self.told.append(("close", code, reason)))
        self.client.on_drain(lambda after, within: self.told.append(("drain", after, within)))
        self.client.on_error(lambda error: self.told.append(("error", error)))

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
        """What listeners of one event were told; of those with one argument that."""
        return [fields[0] if len(fields) == 1 else tuple(fields) for event, *fields in self.told if event == name]

    async def opened(self, **options: Any) -> FakeLink:
        """Welcome the client in its first connection."""
        await self.link.welcome(**options)
        assert self.client.state == "open"
        return self.link

    async def redialled(self, count: int = 2) -> FakeLink:
        """The connection after `count - 1` others, as soon as it is made."""
        for _ in range(4000):
            if len(self.links) >= count:
                await soon()
                return self.links[count - 1]
            await asyncio.sleep(0.05)
        raise AssertionError("the client has not dialled again")
