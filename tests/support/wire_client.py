"""Client that follows or breaks each rule of RFC 6455 and RFC 7692, and a witness that is not affected by it.

It shares no code with the server: frames are built and parsed here, and messages are deflated and inflated with zlib.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import random
import socket
import struct
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.raw import RawClient
from tests.support.server import LiveServer

KIND = "uvicorn-stable"
"""The server in the tests of both RFCs, one of `tests.support.server.SERVERS`."""

NO_UVICORN_PINGS = ("--ws-ping-interval", "0")

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
RSV1, RSV2, RSV3 = 0x40, 0x20, 0x10
MASK = bytes.fromhex("37fa213d")  # of the examples in RFC 6455 section 5.7
SYNC_TAIL = b"\x00\x00\xff\xff"  # RFC 7692 section 7.2.1: left out by the sender
BROWSER_OFFER = "permessage-deflate; client_max_window_bits"
TIMEOUT = 5.0

_KEY = base64.b64encode(b"the sample nonce").decode()
_ACCEPT = base64.b64encode(hashlib.sha1(f"{_KEY}258EAFA5-E914-47DA-95CA-C5AB0DC85B11".encode()).digest()).decode()
_numbers = itertools.count()


class Frame(NamedTuple):
    """One frame from the server."""

    opcode: int
    payload: bytes
    fin: bool = True
    rsv: int = 0


class Message(NamedTuple):
    """One whole message from the server, inflated."""

    opcode: int
    payload: bytes
    compressed: bool = False


class Answer(NamedTuple):
    """The server's answer to a handshake."""

    status: int
    headers: list[tuple[str, str]]

    def all(self, name: str) -> list[str]:
        """Return all values of one header."""
        return [value for header, value in self.headers if header == name.lower()]

    @property
    def deflate(self) -> dict[str, str | None] | None:
        """Parameters of the permessage-deflate that the server accepts; `None` if it accepts no extension."""
        agreed = [part.strip() for value in self.all("Sec-WebSocket-Extensions") for part in value.split(",")]
        if not agreed:
            return None
        assert len(agreed) == 1, agreed
        name, *parameters = (part.strip() for part in agreed[0].split(";"))
        assert name == "permessage-deflate"
        pairs = [parameter.partition("=") for parameter in parameters]
        assert len({key for key, _, _ in pairs}) == len(pairs), agreed
        return {key: value if sign else None for key, sign, value in pairs}


def masked(payload: bytes, mask: bytes) -> bytes:
    """Return the payload under its masking key, RFC 6455 section 5.3."""
    size = len(payload)
    key = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(payload, "big") ^ int.from_bytes(key, "big")).to_bytes(size, "big")


def frame(
    opcode: int,
    payload: bytes = b"",
    *,
    fin: bool = True,
    rsv: int = 0,
    mask: bytes | None = MASK,
    length_bits: int | None = None,
    announced: int | None = None,
) -> bytes:
    """Build one frame, valid or invalid.

    Args:
        opcode: Its opcode.
        payload: Its payload before masking.
        fin: Whether it ends a message.
        rsv: Reserved bits to set.
        mask: Masking key; `None` leaves the frame unmasked.
        length_bits: Width of the length field, 7, 16 or 64; the shortest possible when left out.
        announced: Length in the header; that of the payload when left out.
    """
    length = len(payload) if announced is None else announced
    if length_bits is None:
        length_bits = 7 if length < 126 else 16 if length < 1 << 16 else 64
    bit = 0 if mask is None else 0x80
    head = bytes([(0x80 if fin else 0) | rsv | opcode])
    if length_bits == 7:
        head += bytes([bit | length])
    elif length_bits == 16:
        head += bytes([bit | 126]) + struct.pack("!H", length)
    else:
        head += bytes([bit | 127]) + struct.pack("!Q", length)
    return head + (payload if mask is None else mask + masked(payload, mask))


def fragments(opcode: int, parts: Iterable[bytes], *, rsv: int = 0) -> list[bytes]:
    """Build the frames of one fragmented message; `rsv` is set on the first of them."""
    parts = list(parts)
    return [
        frame(
            CONTINUATION if number else opcode,
            part,
            fin=number == len(parts) - 1,
            rsv=0 if number else rsv,
        )
        for number, part in enumerate(parts)
    ]


def close_frame(code: int | None = None, reason: bytes = b"") -> bytes:
    """Build a close frame."""
    return frame(CLOSE, b"" if code is None else struct.pack("!H", code) + reason)


def deflate(data: bytes, bits: int = 15, *, final: bool = False) -> bytes:
    """Compress one message as RFC 7692 section 7.2.1 says, without a context.

    Args:
        data: The message.
        bits: Size of the window.
        final: Whether the last block has BFINAL set, as in section 7.2.3.4.
    """
    compressor = zlib.compressobj(9, zlib.DEFLATED, -bits)
    if final:
        return compressor.compress(data) + compressor.flush(zlib.Z_FINISH) + b"\x00"
    return compressed_with(compressor, data)


def compressed_with(compressor: zlib._Compress, data: bytes) -> bytes:
    """Compress one message in the context that a compressor has from the messages before."""
    output = compressor.compress(data) + compressor.flush(zlib.Z_SYNC_FLUSH)
    assert output.endswith(SYNC_TAIL)
    return output[:-4]


def inflated_with(decompressor: zlib._Decompress, data: bytes) -> bytes:
    """Inflate one message in small steps: zlib checks a distance against the window only between two calls."""
    output = bytearray()
    rest = data + SYNC_TAIL
    while chunk := decompressor.decompress(rest, 64):
        output += chunk
        rest = decompressor.unconsumed_tail
    assert not decompressor.unconsumed_tail
    return bytes(output)


def far_repeats(distance: int, seed: int = 7) -> bytes:
    """Return text of twice `distance` bytes that repeats itself at that distance and at no shorter one."""
    half = random.Random(seed).randbytes(distance // 2 + 1).hex().encode()[:distance]
    return half * 2


def request(port: int, path: str, headers: Mapping[str, str | None] | None = None) -> bytes:
    """Build a handshake request; `headers` are added, or left out where the value is `None`."""
    fields: dict[str, str | None] = {
        "Host": f"127.0.0.1:{port}",
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": _KEY,
        "Sec-WebSocket-Version": "13",
        **(headers or {}),
    }
    lines = [f"{name}: {value}\r\n" for name, value in fields.items() if value is not None]
    return f"GET {path} HTTP/1.1\r\n{''.join(lines)}\r\n".encode()


class WireClient(RawClient):
    """WebSocket on a bare socket on which a test controls every bit of every frame.

    `RawClient` sends a fixed request on creation; here the test sends its own with `upgrade`.
    """

    def __init__(self, port: int) -> None:
        self.name = f"wire-{next(_numbers)}"
        self.port = port
        self.socket = socket.create_connection(("127.0.0.1", port), TIMEOUT)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.parameters: dict[str, str | None] | None = None
        self._inflater: zlib._Decompress | None = None

    def __enter__(self) -> WireClient:
        return self

    def request(self, path: str = "/echo", headers: Mapping[str, str | None] | None = None) -> bytes:
        """Return the handshake request for a route of the test app and this client's name."""
        path, sign, query = path.partition("?")
        return request(self.port, f"{path}/{self.name}{sign}{query}", headers)

    def upgrade(self, path: str = "/echo", headers: Mapping[str, str | None] | None = None) -> Answer:
        """Send the handshake and return its answer."""
        self.write(self.request(path, headers))
        return self.answer()

    def answer(self) -> Answer:
        """Read the answer to the handshake, and nothing after it."""
        head = bytearray()
        while not head.endswith(b"\r\n\r\n"):
            head += self._exactly(1)
        first, *lines = head.decode("latin-1").strip().split("\r\n")
        pairs = [line.partition(":") for line in lines]
        answer = Answer(int(first.split()[1]), [(name.strip().lower(), value.strip()) for name, _, value in pairs])
        if answer.status == 101:
            assert answer.all("Sec-WebSocket-Accept") == [_ACCEPT]
            self.parameters = answer.deflate
        return answer

    def write(self, *data: bytes) -> None:
        """Send all of it in one segment, as far as TCP allows it."""
        self.socket.sendall(b"".join(data))

    def drip(self, *data: bytes) -> None:
        """Send each byte in its own segment."""
        for byte in b"".join(data):
            self.socket.sendall(bytes([byte]))

    def next_frame(self) -> Frame:
        """Read one frame, and check the rules of RFC 6455 section 5 for every frame of a server."""
        first, second = self._exactly(2)
        assert not second & 0x80, "a server must not mask"
        length = second & 127
        if length == 126:
            (length,) = struct.unpack("!H", self._exactly(2))
            assert length > 125, "the length is not in its shortest form"
        elif length == 127:
            (length,) = struct.unpack("!Q", self._exactly(8))
            assert 1 << 16 <= length < 1 << 63, "the length is not in its shortest form"
        found = Frame(first & 15, self._exactly(length), bool(first & 0x80), first & 0x70)
        assert found.opcode in (CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG)
        assert found.rsv in (0, RSV1)
        if found.rsv:
            assert self.parameters is not None, "RSV1 without an extension"
            assert found.opcode in (TEXT, BINARY), "RSV1 on a frame that is not the first of a message"
        if found.opcode >= CLOSE:
            assert found.fin
            assert length <= 125
        return found

    def message(self) -> Message:
        """Read one whole message, inflated as negotiated; no control frame may come before it."""
        first = last = self.next_frame()
        payload = first.payload
        assert first.opcode in (TEXT, BINARY), first
        while not last.fin:
            last = self.next_frame()
            assert last.opcode == CONTINUATION, last
            payload += last.payload
        if first.rsv:
            payload = inflated_with(self._decompressor(), payload)
        if first.opcode == TEXT:
            payload.decode()
        return Message(first.opcode, payload, bool(first.rsv))

    def _decompressor(self) -> zlib._Decompress:
        assert self.parameters is not None
        if self._inflater is None or "server_no_context_takeover" in self.parameters:
            self._inflater = zlib.decompressobj(-int(self.parameters.get("server_max_window_bits") or 15))
        return self._inflater

    @property
    def window_bits(self) -> int:
        """The window that the handshake allows this client to compress with."""
        assert self.parameters is not None
        return int(self.parameters.get("client_max_window_bits") or 15)

    def echoed(self, opcode: int, payload: bytes) -> bool:
        """Check that the next message from the server is this one."""
        found = self.message()
        return (found.opcode, found.payload) == (opcode, payload)

    def close_info(self, *, answer: bool = False) -> tuple[int | None, str]:
        """Read the close frame, which comes next, and then the end of TCP; return its code and reason.

        Args:
            answer: Whether to answer the close frame, as a client must that has not sent one itself. A server that
                fails a connection does not wait for the answer.
        """
        found = self.next_frame()
        assert found.opcode == CLOSE, found
        if answer:
            with suppress(ConnectionError):  # the server need not wait for the answer
                self.write(frame(CLOSE, found.payload))
        self.eof()
        if not found.payload:
            return None, ""
        return struct.unpack("!H", found.payload[:2])[0], found.payload[2:].decode()

    def eof(self) -> None:
        """Wait for the end of TCP; no data may come before it."""
        try:
            rest = self.socket.recv(1)
        except ConnectionError:
            return
        assert not rest, "data after the close frame"


def quiet_server(*args: str, **config: Any) -> LiveServer:
    """Run a server that sends nothing unprompted: no side of it pings.

    Args:
        args: Further command line arguments.
        config: Options of the test app's `WebSocketConfig`.
    """
    return LiveServer(KIND, config={"heartbeat_type": "off", **config}, args=(*NO_UVICORN_PINGS, *args))


def connect(server: LiveServer, path: str = "/echo", *, offer: str | None = None) -> WireClient:
    """Open a WebSocket.

    Args:
        server: The server.
        path: A route of the test app, without the client id.
        offer: `Sec-WebSocket-Extensions` of the request.
    """
    client = WireClient(server.port)
    answer = client.upgrade(path, {"Sec-WebSocket-Extensions": offer})
    assert answer.status == 101, answer
    return client


class Witness:
    """Well-behaved connection that must not be affected by other clients of the same server."""

    def __init__(self, server: LiveServer) -> None:
        self._server = server
        self._client = connect(server)
        self._numbers = itertools.count()
        self._errors_seen = 0

    def barrier(self) -> None:
        """Return after an iteration of the server's event loop: what was sent before has been read by then."""
        token = f"witness {next(self._numbers)}".encode()
        self._client.write(frame(TEXT, token))
        while self._client.message().payload != token:  # broadcasts reach this connection too
            pass

    def check(self) -> None:
        """Check that the connection still echoes, and that the server has logged no error since the last check."""
        self.barrier()
        errors = self._server.errors()
        new, self._errors_seen = errors[self._errors_seen :], len(errors)
        assert not new, "\n".join(new)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


class PeakMemory:
    """Peak memory of a server since the creation of this object, relative to its memory then.

    `ru_maxrss` of the probe never decreases, so the peak of an earlier test would hide that of this test. On Linux the
    mark in its process file system is reset instead.
    """

    def __init__(self, server: LiveServer) -> None:
        self._process = Path(f"/proc/{server.process.pid}")
        server.post("/collect")
        (self._process / "clear_refs").write_text("5")
        self._before = self._mark()

    def growth(self) -> int:
        """Return the bytes by which the peak has risen."""
        return self._mark() - self._before

    def _mark(self) -> int:
        lines = (self._process / "status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
