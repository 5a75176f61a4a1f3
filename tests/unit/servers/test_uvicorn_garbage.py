"""Tests that reference counting frees the protocol object and all that it owns, after each kind of end."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from uvicorn.config import Config
from uvicorn.server import ServerState

from fastapi_ws_stabilizer.servers.uvicorn.protocol import StableWebSocketProtocol
from tests.support.fake_websocket import eventually, with_deadline
from tests.support.wire_client import BINARY, CLOSE, CONTINUATION, TEXT, close_frame, frame
from tests.unit.servers.test_uvicorn_protocol import REQUEST


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    """Leave everything to reference counting."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Sink:
    """Receiver that knows its transport, as a connection does.

    Attributes:
        direct: The transport.
    """

    def __init__(self, direct: Any) -> None:
        self.direct = direct

    def data_received(self) -> bool:
        return True

    def message_received(self, message: str | bytes) -> None:
        if message == "close":
            self.direct.close(4000, "bye")
        elif message == "pause":
            self.direct.pause_reading()

    def violation_received(self, fail: Callable[[], None]) -> None:
        fail()

    def before_shutdown(self) -> None:
        pass

    def connection_lost(self, event: Any) -> None:
        pass


class Application:
    """Application that attaches a receiver to its WebSocket, or reads it.

    Args:
        attaches: Whether it attaches one.
    """

    def __init__(self, *, attaches: bool) -> None:
        self.attaches = attaches
        self.ended = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        if self.attaches:
            direct = receive.__self__
            direct.attach(Sink(direct), max_message_bytes=1 << 20, own_pings=True)
            await self.ended.wait()
        else:
            while (await receive())["type"] == "websocket.receive":
                pass


async def reset(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


def wrote(*data: bytes) -> Callable[[asyncio.StreamWriter], Awaitable[None]]:
    async def act(writer: asyncio.StreamWriter) -> None:
        writer.write(b"".join(data))

    return act


ENDS = {
    "close frame": wrote(close_frame(1000)),
    "invalid frame": wrote(frame(3)),
    "invalid close frame": wrote(frame(CLOSE, b"\xff")),
    "reset": reset,
    "lost within message": wrote(frame(TEXT, b"begin", fin=False), frame(CONTINUATION, announced=100)),
    "large read": wrote(frame(BINARY, bytes(100_000)), close_frame(1000)),
    "server": wrote(frame(TEXT, b"close"), close_frame(4000)),
    "pause": wrote(frame(TEXT, b"pause"), frame(TEXT, b"unread")),
}


@pytest.mark.parametrize("attaches", [True, False], ids=["attached", "unattached"])
@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
async def test_ended_protocol_is_freed_without_collector(
    end: Callable[[asyncio.StreamWriter], Awaitable[None]], attaches: bool
) -> None:
    """After its end, no cycle holds the protocol object, its receiver, or the connection of `websockets`."""
    application = Application(attaches=attaches)
    config = Config(application, log_level="critical", ws_ping_interval=None)
    config.load()
    state = ServerState()
    made: list[Any] = []

    def create() -> StableWebSocketProtocol:
        protocol = StableWebSocketProtocol(config, state, app_state={}, _loop=asyncio.get_running_loop())
        made[:] = [weakref.ref(protocol), weakref.ref(protocol.conn)]
        return protocol

    server = await asyncio.get_running_loop().create_server(create, "127.0.0.1", 0)
    try:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(REQUEST)
        assert (await with_deadline(reader.readuntil(b"\r\n\r\n"))).startswith(b"HTTP/1.1 101 ")
        if attaches:
            made.append(weakref.ref(made[0]().sink))
        await end(writer)
        await asyncio.sleep(0.01)
        writer.close()
        if made[0]() is not None and made[0]().read_paused:  # it does not read the end of the stream
            made[0]().transport.abort()
        await eventually(lambda: not state.connections)
        application.ended.set()
        await eventually(lambda: not state.tasks)
        for _ in range(3):  # callbacks that the end has scheduled
            await asyncio.sleep(0)
        assert [ref() for ref in made] == [None] * len(made)
    finally:
        server.close()
        await server.wait_closed()
