"""A process that breaks every rule at once: `python -m tests.live.rule_breaker PORT SECONDS [RULES IT KEEPS]`.

Each rule has a thread, which begins anew as soon as it is thrown out, and everything comes from one address. It ends by
itself, and prints how often each rule was broken.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from fastapi_ws_stabilizer.wire.v1.frames import SUBPROTOCOL
from tests.support.wire_client import BINARY, BROWSER_OFFER, CONTINUATION, PING, RSV1, TEXT, deflate, frame, request

ADDRESS = "127.0.0.9"
"""Where it comes from: another address of this machine than that of the clients that keep the rules."""

HALF_OPEN = 64
"""Handshakes that it leaves half done at a time."""

PINGS = frame(PING, b"") * 20_000
TINY = frame(TEXT, b"x") * 20_000
TEXT_PINGS = frame(TEXT, b"ping") * 10_000
FRAGMENTS = frame(TEXT, b"", fin=False) + frame(CONTINUATION, b"", fin=False) * 20_000
BAD = (frame(TEXT, b'{"type":"echo"') + frame(TEXT, b"\xc3\xa9]")) * 200
DEEP = frame(TEXT, b"[" * 30_000 + b"]" * 30_000) * 10
BOMB = deflate(b"\x00" * (60 << 10))
HELLO = frame(TEXT, b'{"type":"hello","v":1,"n":1}')
ACKS = frame(TEXT, b'{"type":"ack","seq":0}') * 5000


class Breaker:
    """Everything that is done, and how often.

    Args:
        port: The server's.
        seconds: For how long.
    """

    def __init__(self, port: int, seconds: float) -> None:
        self.port = port
        self.until = time.monotonic() + seconds
        self.count: Counter[str] = Counter()

    @contextmanager
    def _dialled(self, path: str, **headers: str | None) -> Iterator[socket.socket]:
        """A WebSocket whose handshake was accepted, and of which nothing more is read."""
        with socket.socket() as dialled:
            dialled.bind((ADDRESS, 0))
            dialled.settimeout(1)
            dialled.connect(("127.0.0.1", self.port))
            fields = {name.replace("_", "-"): value for name, value in headers.items()}
            dialled.sendall(request(self.port, path, fields))
            answer = b""
            while b"\r\n\r\n" not in answer:
                part = dialled.recv(4096)
                if not part:
                    raise ConnectionError("refused")
                answer += part
            if not answer.startswith(b"HTTP/1.1 101"):
                self.count["refused"] += 1
                raise ConnectionError("refused")
            yield dialled

    def send(self, rule: str, data: bytes, path: str = "/echo", first: bytes = b"", **headers: str) -> None:
        """Send the same until the server has had enough."""
        with self._dialled(f"{path}/{rule.replace(' ', '-')}", **headers) as dialled:
            dialled.sendall(first)
            while time.monotonic() < self.until:
                dialled.sendall(data)
                self.count[rule] += 1

    def reconnect(self) -> None:
        """Come and go."""
        with self._dialled("/echo/breaker"):
            self.count["reconnect"] += 1

    def half_open(self) -> None:
        """Leave handshakes half done."""
        begun = []
        try:
            for _ in range(HALF_OPEN):
                half = socket.socket()
                begun.append(half)
                half.bind((ADDRESS, 0))
                half.settimeout(1)
                half.connect(("127.0.0.1", self.port))
                half.sendall(request(self.port, "/echo/breaker")[:-4])
                self.count["half open"] += 1
            time.sleep(max(0.0, min(0.5, self.until - time.monotonic())))
        finally:
            for half in begun:
                half.close()

    def rules(self) -> dict[str, Callable[[], None]]:
        """What each thread does, again and again."""
        giant = frame(BINARY, b"x" * (1 << 20))
        bombs = frame(TEXT, BOMB, rsv=RSV1) * 100
        announced = frame(BINARY, b"x" * 1000, announced=1 << 40)
        return {
            "pings": lambda: self.send("pings", PINGS),
            "pings as text": lambda: self.send("pings as text", TEXT_PINGS),
            "tiny messages": lambda: self.send("tiny messages", TINY),
            "fragments": lambda: self.send("fragments", FRAGMENTS),
            "giant frames": lambda: self.send("giant frames", giant),
            "announced": lambda: self.send("announced", announced),
            "bad JSON": lambda: self.send("bad JSON", BAD, "/run"),
            "deep JSON": lambda: self.send("deep JSON", DEEP, "/run"),
            "bombs": lambda: self.send("bombs", bombs, Sec_WebSocket_Extensions=BROWSER_OFFER),
            "acks": lambda: self.send("acks", ACKS, "/run", HELLO, Sec_WebSocket_Protocol=SUBPROTOCOL),
            "half open": self.half_open,
            "reconnect": self.reconnect,
            "more of it": self.reconnect,
        }

    def run(self, *kept: str) -> None:
        """Break all rules but some, and tell how often."""

        def again(rule: Callable[[], None]) -> None:
            while time.monotonic() < self.until:
                with suppress(OSError):
                    rule()

        threads = [
            threading.Thread(target=again, args=(rule,), daemon=True)
            for name, rule in self.rules().items()
            if name not in kept
        ]
        for thread in threads:
            thread.start()
            time.sleep(0.02)  # so that each is let in once before those that only dial come
        for thread in threads:
            thread.join(max(0.1, self.until + 3 - time.monotonic()))
        print(json.dumps(self.count))


if __name__ == "__main__":
    os.nice(19)  # the cores are the server's and the witness's: what is measured is what the rules cost it
    Breaker(int(sys.argv[1]), float(sys.argv[2])).run(*sys.argv[3:])
