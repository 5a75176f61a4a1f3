"""Process that breaks every rule at once: `python -m tests.live.rule_breaker PORT SECONDS [SKIPPED_RULES]`.

Each rule has a thread, which starts again as soon as the server rejects or closes its connection. All connections come
from one address. The process prints how often each rule was broken, and exits.
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
"""Source address, other than the address of the clients that obey the rules."""

HALF_OPEN = 64
"""Unfinished handshakes at a time."""

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
    """Threads that break the rules, and their counts.

    Args:
        port: Port of the server.
        seconds: How long to run.
    """

    def __init__(self, port: int, seconds: float) -> None:
        self.port = port
        self.until = time.monotonic() + seconds
        self.count: Counter[str] = Counter()

    @contextmanager
    def _dialled(self, path: str, **headers: str | None) -> Iterator[socket.socket]:
        """Yield a WebSocket after its handshake was accepted; the caller reads nothing."""
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
        """Send the same data until the server closes."""
        with self._dialled(f"{path}/{rule.replace(' ', '-')}", **headers) as dialled:
            dialled.sendall(first)
            while time.monotonic() < self.until:
                dialled.sendall(data)
                self.count[rule] += 1

    def reconnect(self) -> None:
        """Connect and disconnect."""
        with self._dialled("/echo/breaker"):
            self.count["reconnect"] += 1

    def half_open(self) -> None:
        """Leave handshakes unfinished."""
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
        """Return the action that each thread repeats, by rule."""
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

    def run(self, *skipped: str) -> None:
        """Break all rules except the skipped ones, and print how often."""

        def repeat(rule: Callable[[], None]) -> None:
            while time.monotonic() < self.until:
                with suppress(OSError):
                    rule()

        threads = [
            threading.Thread(target=repeat, args=(rule,), daemon=True)
            for name, rule in self.rules().items()
            if name not in skipped
        ]
        for thread in threads:
            thread.start()
            time.sleep(0.02)  # each rule connects once before the threads that only reconnect start
        for thread in threads:
            thread.join(max(0.1, self.until + 3 - time.monotonic()))
        print(json.dumps(self.count))


if __name__ == "__main__":
    os.nice(19)  # leaves the cores to the server and the witness, where the delay is measured
    Breaker(int(sys.argv[1]), float(sys.argv[2])).run(*sys.argv[3:])
