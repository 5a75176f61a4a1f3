"""`StableWebSocketProtocol` on a transport without a network: any bytes, in any pieces.

An input begins with a byte of switches and a byte that says how it is cut to pieces. The rest is what the client sends,
as its handshake or after one.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import random
from collections.abc import Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final
from unittest import mock

from fastapi import HTTPException, WebSocketException
from starlette.websockets import WebSocket
from uvicorn.config import Config
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.server import ServerState

from fastapi_ws_stabilizer.compat.uvicorn import PushedEvents
from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.events import Event
from fastapi_ws_stabilizer.manager import WebSocketConnectionManager
from fastapi_ws_stabilizer.servers.uvicorn import paced_parser
from fastapi_ws_stabilizer.servers.uvicorn import protocol as protocol_module
from fastapi_ws_stabilizer.servers.uvicorn.frame_parser import MAX_PARTS
from fastapi_ws_stabilizer.servers.uvicorn.protocol import StableWebSocketProtocol
from fastapi_ws_stabilizer.socket import StableSocket
from fastapi_ws_stabilizer.wire.rfc6455 import CLOSE, MAX_CONTROL_BYTES, PING, PONG
from tests.fuzz import virtual
from tests.fuzz.choices import Choices

LIMIT: Final = 2048
"""Maximum bytes of one message."""

HIGH_WATER: Final = 512
"""Buffered bytes after which a slow transport pauses writing."""

LEAST_FRAME: Final = 6
LONGEST_HEAD: Final = 14
LONGEST_HANDSHAKE: Final = 129 * 8192

MAX_PIECES: Final = 128

ENOUGH: Final = 2
"""Messages after which an application with `leaves` returns."""

AT_ONCE: Final = 64
"""Bytes parsed in one go here: few, so that small inputs are parsed in slices too. Each slice has one frame."""

TURNS: Final = 60
"""Iterations of the loop within which everything has to happen that does not wait for a timer."""

OPTIONS: Final = WebSocketConfig(
    max_message_size=LIMIT, inbox_max_messages=4, inbox_max_bytes=2 * LIMIT, compression_min_bytes=16
)


@dataclass(frozen=True)
class Circumstances:
    """Conditions under which an input is processed.

    Attributes:
        linked: Whether a manager serves it, or an application without the library.
        deflates: Whether the client offers compression.
        numbered: Whether it offers `stabilizer.v1.json`.
        slow: Whether the application begins to read when everything was sent.
        early: Whether the client sends before it is accepted.
        stalls: Whether the transport pauses writing from time to time.
        leaves: Whether the application returns after some messages.
    """

    linked: bool = True
    deflates: bool = False
    numbered: bool = False
    slow: bool = False
    early: bool = False
    stalls: bool = False
    leaves: bool = False

    @classmethod
    def of(cls, switches: int) -> Circumstances:
        """Return the conditions that some bits stand for."""
        return cls(*(bool(switches >> bit & 1) for bit in range(7)))

    @property
    def request(self) -> bytes:
        """A valid handshake."""
        lines = [
            b"GET /ann HTTP/1.1",
            b"Host: testserver",
            b"Upgrade: websocket",
            b"Connection: Upgrade",
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
            b"Sec-WebSocket-Version: 13",
        ]
        if self.deflates:
            lines.append(b"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits")
        if self.numbered:
            lines.append(b"Sec-WebSocket-Protocol: stabilizer.v1.json")
        return b"\r\n".join([*lines, b"", b""])


@dataclass
class Outcome:
    """Result of an input.

    Attributes:
        messages: What the application has read.
        written: What the server has sent.
        sent_close: Whether a close frame is in it.
        attached: Whether a direct transport was used.
        ended_by_us: Whether the server was the first to close, or closes for an invalid frame.
        failures: Exceptions raised where none may be.
    """

    messages: list[Any] = field(default_factory=list)
    written: bytes = b""
    sent_close: bool = False
    attached: bool = False
    ended_by_us: bool = False
    failures: list[BaseException] = field(default_factory=list)


class MemoryTransport(asyncio.Transport):
    """Transport that treats its protocol like asyncio's socket transport, and records what is written."""

    def __init__(self, protocol: Any, *, stalls: bool = False) -> None:
        super().__init__()
        self._protocol = protocol
        self._stalls = stalls
        self._closing = self._eof = self._lost = False
        self._held = 0
        self.reading = True
        self.written = bytearray()

    def write(self, data: Any) -> None:
        """Record bytes; like asyncio, reject them after an end of file."""
        assert isinstance(data, (bytes, bytearray, memoryview))
        if self._eof:
            raise RuntimeError("Cannot call write() after write_eof()")
        if not data:
            return
        assert not self._closing, f"written after the close: {bytes(data[:80])!r}"
        self.written += data
        if self._stalls:
            stalled, self._held = self._held > HIGH_WATER, self._held + len(data)
            if not stalled and self._held > HIGH_WATER:
                self._protocol.pause_writing()
                asyncio.get_running_loop().call_soon(self._drain)

    def _drain(self) -> None:
        self._held = 0
        if not self._lost:
            self._protocol.resume_writing()

    def write_eof(self) -> None:
        """Close the writing side."""
        self._eof = True

    def can_write_eof(self) -> bool:
        """Return `True`."""
        return True

    def is_closing(self) -> bool:
        """Return whether it was closed."""
        return self._closing

    def close(self) -> None:
        """Close it soon, and inform the protocol."""
        if not self._closing:
            self._closing, self.reading = True, False
            asyncio.get_running_loop().call_soon(self.lose)

    abort = close

    def lose(self) -> None:
        """Lose the connection."""
        if not self._lost:
            self._closing = self._lost = True
            self.reading = False
            self._protocol.connection_lost(None)

    def pause_reading(self) -> None:
        """Stop delivering data to the protocol."""
        self.reading = False

    def resume_reading(self) -> None:
        """Deliver data to the protocol again."""
        self.reading = not self._closing

    def is_reading(self) -> bool:
        """Return whether it reads."""
        return self.reading

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return the default: nothing is known."""
        return default

    def get_write_buffer_size(self) -> int:
        """Return the bytes that the client has not taken."""
        return self._held if self._stalls and not self._lost else 0


class _Application:
    """Application that reads and records everything.

    Attributes:
        open: Whether it may accept.
        reads: Whether it may read.
    """

    def __init__(self, circumstances: Circumstances) -> None:
        self.outcome = Outcome()
        self._circumstances = circumstances
        self.manager = WebSocketConnectionManager(OPTIONS)
        self.manager.events.subscribe(self._heard)
        self.open, self.reads = asyncio.Event(), asyncio.Event()
        self.left = False
        self.socket: StableSocket | None = None

    def _heard(self, report: Event) -> None:
        if report.error is not None:
            self.outcome.failures.append(report.error)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one WebSocket."""
        try:
            await self.open.wait()
            if self._circumstances.linked:
                await self._serve(WebSocket({**scope, "path_params": {"client_id": "ann"}}, receive, send))
            else:
                await self._read(receive, send)
        except (WebSocketException, HTTPException, ClientDisconnected):
            pass  # FastAPI's handlers and uvicorn would handle these errors
        except Exception as error:
            self.outcome.failures.append(error)
        finally:
            self.left = True

    async def _serve(self, websocket: WebSocket) -> None:
        async with self.manager.serve(websocket) as socket:
            self.socket = socket
            await self.reads.wait()
            async for message in socket:
                self.outcome.messages.append(message)
                if self._leaves:
                    break

    async def _read(self, receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await self.reads.wait()
        while (event := await receive())["type"] == "websocket.receive":
            text = event.get("text")
            self.outcome.messages.append(event["bytes"] if text is None else text)
            if self._leaves:
                with contextlib.suppress(RuntimeError):  # uvicorn may have closed it for an invalid frame
                    await send({"type": "websocket.close"})
                break

    @property
    def _leaves(self) -> bool:
        return self._circumstances.leaves and len(self.outcome.messages) >= ENOUGH


@functools.cache
def _config() -> Config:
    config = Config(print, log_config=None, log_level="critical", ws_max_size=LIMIT, ws_ping_interval=None)
    config.load()
    return config


class Served:
    """One connection, from its handshake to its close."""

    def __init__(self, circumstances: Circumstances) -> None:
        self._circumstances = circumstances
        self.app = _Application(circumstances)
        config = _config()
        config.loaded_app = self.app
        loop = asyncio.get_running_loop()
        self.protocol = StableWebSocketProtocol(config, ServerState(), app_state={}, _loop=loop)
        self.transport = MemoryTransport(self.protocol, stalls=circumstances.stalls)
        self.protocol.connection_made(self.transport)

    async def takes(self, handshake: Iterable[bytes], pieces: Iterable[bytes]) -> Outcome:
        """Deliver a handshake and the bytes after it, piece by piece, then lose the connection."""
        app = self.app
        await app.manager.start()
        if not self._circumstances.early:
            app.open.set()
        if not self._circumstances.slow:
            app.reads.set()
        for piece in handshake:
            await self._feeds(piece, LONGEST_HANDSHAKE)
        if not self._circumstances.early:
            await self._until(lambda: self.transport.written or app.left or not self.protocol.tasks)
        limit = LONGEST_HANDSHAKE if self._circumstances.early else LONGEST_HEAD + MAX_CONTROL_BYTES
        for piece in pieces:
            await self._feeds(piece, limit)
        app.open.set()
        app.reads.set()
        await asyncio.sleep(0.5)  # for everything except long timeouts
        return await self._ends()

    async def _feeds(self, piece: bytes, limit: int) -> None:
        if not self.transport.reading:
            await self._until(lambda: self.transport.reading or self.transport.is_closing(), patient=True)
        if self.transport.is_closing():
            return
        self.protocol.data_received(piece)
        self._looks(piece, limit)
        if self._circumstances.leaves:
            await asyncio.sleep(0.001)  # as long as teardown takes
        elif len(piece) & 1:
            await asyncio.sleep(0)

    def _looks(self, piece: bytes, limit: int) -> None:
        """Check that no buffer exceeds its limit."""
        protocol = self.protocol
        assert len(protocol.conn.reader.buffer) <= limit + len(piece), "the unparsed request exceeds its limit"
        parser = protocol.parser
        if parser is not None:
            assert parser.unparsed_bytes <= limit + len(piece), "the unparsed frames exceed their limit"
            assert len(parser._parts) <= MAX_PARTS
            assert sum(map(len, parser._parts)) <= LIMIT
        if protocol.sink is not None:
            assert len(protocol.conn.writes) == 0 or protocol.close_sent
        if self.app.socket is not None:
            waiting = len(self.app.socket._connection.inbox)
            assert waiting <= OPTIONS.inbox_max_messages + len(piece) // LEAST_FRAME + 1, (
                "the unread data exceeds its limit"
            )

    async def _until(self, condition: Callable[[], Any], *, patient: bool = False) -> None:
        for _ in range(TURNS):
            if condition():
                return
            await asyncio.sleep(0)
        self.app.open.set()
        self.app.reads.set()
        for _ in range(TURNS):
            if condition():
                return
            await asyncio.sleep(0.01 if patient else 0)
        raise AssertionError("no progress")

    async def _ends(self) -> Outcome:
        outcome = self.app.outcome
        outcome.attached = isinstance(self.protocol.queue, PushedEvents)
        conn = self.protocol.conn
        first_to_close = conn.close_sent is not None and not conn.close_rcvd_then_sent
        outcome.ended_by_us = first_to_close
        self.transport.lose()
        await self._until(lambda: not self.protocol.tasks, patient=True)
        await self.app.manager.graceful_shutdown(1.0)
        outcome.written = bytes(self.transport.written)
        if outcome.failures:
            raise AssertionError(f"raised: {outcome.failures!r}") from outcome.failures[0]
        return outcome


def pieces_of(data: bytes, how: int) -> list[bytes]:
    """Return bytes cut to pieces: whole, in equal pieces down to single bytes, or at random."""
    if how == 0 or not data:
        return [data] if data else []
    if how < 128:
        size = max(how, len(data) // MAX_PIECES + 1)
        return [data[at : at + size] for at in range(0, len(data), size)]
    chance = random.Random(how)
    cuts = sorted(chance.randrange(len(data) + 1) for _ in range(how - 127))
    borders = [0, *cuts, len(data)]
    return [data[start:end] for start, end in itertools.pairwise(borders) if start < end]


def outcome_of(circumstances: Circumstances, data: bytes, how: int) -> Outcome:
    """Return the result of bytes after a valid handshake, in pieces of some kind."""

    async def one() -> Outcome:
        return await Served(circumstances).takes([circumstances.request], pieces_of(data, how))

    outcome = _run(one())
    frames = [opcode for opcode, _ in frames_in(outcome.written, circumstances)]
    outcome.sent_close = CLOSE in frames
    # RFC 6455 section 5.5.1 allows a pong after the close frame; uvicorn sends it, and we do not.
    assert not outcome.attached or CLOSE not in frames[:-1], "data after the close frame"
    return outcome


def _run(one: Coroutine[Any, Any, Outcome]) -> Outcome:
    with (
        mock.patch.object(protocol_module, "MAX_UNPACED_BYTES", AT_ONCE),
        mock.patch.object(paced_parser, "PARSE_SLICE", 0.0),
    ):
        return virtual.run(one)


def frames_in(written: bytes, circumstances: Circumstances) -> Iterator[tuple[int, bytes]]:
    """Return the frames that a server has written after the handshake; check that each is whole and well-formed."""
    head, _, stream = written.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101 "), head[:80]
    closed = False
    while stream:
        first, length, at = stream[0], stream[1], 2
        opcode = first & 0x0F
        assert not closed or opcode == PONG, f"data after the close frame: {stream[:80]!r}"
        assert length < 128, "the server masks"
        assert first & 0x80, "the server sends fragments"
        assert not first & 0x30
        assert not first & 0x40 or circumstances.deflates
        if length == 126:
            length, at = int.from_bytes(stream[2:4], "big"), 4
        elif length == 127:
            length, at = int.from_bytes(stream[2:10], "big"), 10
        assert len(stream) >= at + length, "the last frame is incomplete"
        payload, stream = stream[at : at + length], stream[at + length :]
        assert opcode in (1, 2, CLOSE, PING, PONG)
        assert opcode < CLOSE or (length <= MAX_CONTROL_BYTES and not first & 0x40)
        if opcode == CLOSE:
            closed = True
            payload[2:].decode("utf-8")
        yield opcode, payload


def protocol(data: bytes) -> None:
    """Use bytes for the data after a valid handshake; check that whole and in pieces they have the same result."""
    choices = Choices(data)
    circumstances, how = Circumstances.of(choices.number()), choices.number() or 1
    same_in_pieces(circumstances, choices.rest(), how)


def same_in_pieces(circumstances: Circumstances, stream: bytes, how: int) -> Outcome:
    """Return the result of some bytes, which is the same whole and in pieces."""
    whole, cut = outcome_of(circumstances, stream, 0), outcome_of(circumstances, stream, how)
    shorter = min(len(whole.messages), len(cut.messages))
    assert whole.messages[:shorter] == cut.messages[:shorter], "pieces change the messages"
    # Data in the same read as the data that we close for is discarded. A client that closes before the accept is not
    # served.
    if not whole.ended_by_us and not cut.ended_by_us and not circumstances.early:
        assert len(whole.messages) == len(cut.messages), "pieces change the number of messages"
        assert whole.sent_close == cut.sent_close
    return cut


def handshake(data: bytes) -> None:
    """Use bytes for a whole connection, including the handshake."""
    switches, how, request = (*data[:1], 0)[0], (*data[1:2], 1)[0], data[2:]
    circumstances = Circumstances.of(switches & 0b010001)

    head, blank, rest = request.partition(b"\r\n\r\n")  # uvicorn's HTTP protocols hand over a request, and no more

    async def one() -> Outcome:
        return await Served(circumstances).takes(pieces_of(head + blank, how), pieces_of(rest, how))

    outcome = _run(one())
    assert not outcome.written or outcome.written.startswith(b"HTTP/1.1 ")
