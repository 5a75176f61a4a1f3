"""Clients that follow random schedules: `python -m tests.live.random_schedules PORT SEED SECONDS`.

Each schedule opens one connection, then sends, waits, cuts, half-closes and resets at random. It does so in the middle
of the handshake, of a frame and of the closing handshake too. The process prints the count of each step and exits.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import socket
import struct
import sys
from collections import Counter
from contextlib import suppress

from fastapi_ws_stabilizer.wire.v1.frames import SUBPROTOCOL
from tests.support.wire_client import (
    BINARY,
    BROWSER_OFFER,
    CLOSE,
    PING,
    PONG,
    RSV1,
    TEXT,
    close_frame,
    deflate,
    fragments,
    frame,
    request,
)

EXPECTED_BUG = "expected by the test"
"""Text of the app's deliberate bugs. Its log may show no others."""

ACTORS = 24
"""Concurrent clients."""

SHARED_IDS = 6
"""Client ids that actors share, fewer than actors, so that they replace each other's connections."""

_dials = itertools.count(1)

PATHS = ("/run", "/loop", "/catch-all", "/tasks", "/push", "/busy", "/adopt")


class Schedule:
    """One connection from its first byte to its last.

    Args:
        port: Port of the server.
        chance: Source of its decisions.
        taken: Counter of the steps.
        tokens: Session token and sequence number from the server, by client id.
        own_id: Client id that no other actor uses.
    """

    def __init__(
        self,
        port: int,
        chance: random.Random,
        taken: Counter[str],
        tokens: dict[str, tuple[str, int]],
        own_id: str,
    ) -> None:
        self._port = port
        self._chance = chance
        self._taken = taken
        self._tokens = tokens
        self._client_id = own_id if chance.random() < 0.7 else f"shared-{chance.randrange(SHARED_IDS)}"
        self._is_v1 = chance.random() < 0.5
        if self._is_v1:  # a plain client with the same id would end its session
            self._client_id += "-v1"
        self._welcome = asyncio.Event()
        self._deflates = chance.random() < 0.3
        self._sent = 0

    def _take(self, *steps: str) -> str:
        step = self._chance.choice(steps)
        self._taken[step] += 1
        return step

    def _handshake(self) -> bytes:
        path = "/run" if self._is_v1 and self._chance.random() < 0.6 else self._chance.choice(PATHS)
        headers: dict[str, str | None] = {}
        if self._is_v1:
            headers["Sec-WebSocket-Protocol"] = SUBPROTOCOL
        if self._deflates:
            headers["Sec-WebSocket-Extensions"] = BROWSER_OFFER
        return request(self._port, f"{path}/{self._client_id}", headers)

    def _hello(self) -> bytes:
        hello: dict[str, object] = {"type": "hello", "v": 1, "n": next(_dials)}
        if (known := self._tokens.get(self._client_id)) and self._chance.random() < 0.9:
            hello["resume"] = {"token": known[0], "seq": known[1]}
        return frame(TEXT, json.dumps(hello).encode())

    def _message(self) -> bytes:
        kind = self._take("message", "message", "say", "ping", "binary", "fragments", "compressed", "garbage", "large")
        if self._is_v1 and kind in ("binary", "large"):  # no frames of the protocol: they end the session
            kind = "message"
        name = "say" if kind == "say" else "any"
        if self._is_v1:
            self._sent += 1
            body: dict[str, object] = {"type": "msg", "seq": self._sent, "event": name, "data": {"type": name}}
            if self._chance.random() < 0.3:
                body["id"] = f"r{self._sent}"
        else:
            body = {"type": name}
        text = json.dumps(body).encode()
        if kind == "ping":
            return frame(PING, b"p") + frame(PONG, b"q") + frame(TEXT, b"ping")
        elif kind == "binary":
            return frame(BINARY, b"b" * self._chance.randrange(2000))
        elif kind == "fragments":
            return b"".join(fragments(TEXT, [text[:5], text[5:]]))
        elif kind == "compressed" and self._deflates:
            return frame(TEXT, deflate(text + b" " * self._chance.choice((0, 60_000))), rsv=RSV1)
        elif kind == "garbage" and (not self._is_v1 or self._chance.random() < 0.1):  # this ends the session
            return frame(TEXT, self._chance.choice((b"{", b"[" * 500, b'{"type":3}', b"", b"\xff")))
        elif kind == "large":
            return frame(TEXT, json.dumps({"type": "any", "pad": "p" * 30_000}).encode())
        return frame(TEXT, text)

    async def play(self) -> None:
        """Run the schedule, which reads the server's answers or leaves them unread at random."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 20)
        reading: asyncio.Task[None] | None = None
        try:
            first = self._handshake()
            says_hello_at_once = self._is_v1 and self._chance.random() < 0.3
            if says_hello_at_once:
                first += self._hello()
            if self._chance.random() < 0.3:  # messages or a close frame in the segment of the handshake
                first += b"".join(self._message() for _ in range(self._chance.randrange(4)))
                first += close_frame(1000) if self._chance.random() < 0.3 else b""
            if self._take("whole", "whole", "whole", "whole", "in parts", "cut in the handshake") != "whole":
                part = self._chance.randrange(len(first))
                writer.write(first[:part])
                await asyncio.sleep(self._chance.uniform(0, 0.03))
                if self._chance.random() < 0.5:
                    return
                first = first[part:]
            writer.write(first)
            if self._chance.random() < 0.8:
                reading = asyncio.ensure_future(self._read(reader))
            if self._chance.random() < 0.8:  # the other schedules send before the handshake is answered
                await asyncio.sleep(self._chance.uniform(0.05, 0.3))
            if self._is_v1 and not says_hello_at_once and self._chance.random() < 0.95:
                writer.write(self._hello())
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._welcome.wait(), 0.3)
            for _ in range(self._chance.randrange(12)):
                step = self._take(
                    *("send",) * 6, "wait", "wait", "wait", "close", "close", "hello", "half-close", "in mid-frame"
                )
                if step == "send":
                    writer.write(self._message())
                elif step == "hello" and self._is_v1:
                    writer.write(self._hello())
                elif step == "close":
                    code = self._chance.choice((1000, 1001, 4000, 4001))
                    before = b"".join(self._message() for _ in range(self._chance.choice((0, 1, 8))))
                    writer.write(before + close_frame(code) + self._message())
                elif step == "half-close":
                    writer.write_eof()
                elif step == "in mid-frame":
                    whole = self._message()
                    writer.write(whole[: self._chance.randrange(len(whole))])
                    break
                await asyncio.sleep(self._chance.choice((0, 0, 0.001, 0.02, 0.2)))
            await asyncio.sleep(self._chance.choice((0, 0.1, 0.3)))
        except (OSError, RuntimeError):  # the server closed first; RuntimeError is a write after EOF
            self._taken["ended by the server"] += 1
        finally:
            if reading is not None:
                reading.cancel()
            self._disconnect(writer)

    def _disconnect(self, writer: asyncio.StreamWriter) -> None:
        step = self._take("reset", "close the socket", "abort")
        if step == "reset" and (bare := writer.get_extra_info("socket")) is not None:
            with suppress(OSError):
                bare.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if step == "abort":
            writer.transport.abort()
        writer.close()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        with suppress(OSError, asyncio.IncompleteReadError, ValueError):
            await reader.readuntil(b"\r\n\r\n")
            while True:
                first, second = await reader.readexactly(2)
                length = second & 127
                if length == 126:
                    (length,) = struct.unpack("!H", await reader.readexactly(2))
                elif length == 127:
                    (length,) = struct.unpack("!Q", await reader.readexactly(8))
                payload = await reader.readexactly(length)
                if first & 15 == CLOSE:
                    self._taken["closed by the server"] += 1
                    return
                if first & 15 == TEXT and not first & RSV1 and payload.startswith(b'{"type":"welcome"'):
                    welcome = json.loads(payload)
                    self._taken[f"welcome {welcome['resume']}"] += 1
                    self._sent = welcome["ack"]
                    self._tokens[self._client_id] = welcome["token"], welcome["seq"]
                    self._welcome.set()


async def main(port: int, seed: str, seconds: float) -> None:
    """Run schedules concurrently for `seconds`, and print the counts."""
    taken: Counter[str] = Counter()
    tokens: dict[str, tuple[str, int]] = {}
    loop = asyncio.get_running_loop()
    ends = loop.time() + seconds

    async def actor(number: int) -> None:
        chance = random.Random(f"{seed}/{number}")
        while loop.time() < ends:
            taken["schedules"] += 1
            with suppress(OSError):
                await asyncio.wait_for(Schedule(port, chance, taken, tokens, f"own-{number}").play(), 10)

    await asyncio.gather(*(actor(number) for number in range(ACTORS)))
    print(json.dumps(taken))


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2], float(sys.argv[3])))
