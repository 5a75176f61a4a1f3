"""Control channel of a benchmark server: commands come in, measured costs go out.

The channel is a socket that the parent process passes on. Each command and each answer is one line of JSON. A server
stops when its parent closes that socket or dies, so no server is left running.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import os
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from benchmarks.channel import CONTROL_FD, OPTIONS
from benchmarks.messages import MAKERS, stamped

NEVER = 10_000_000.0
"""Seconds between two heartbeats where the scenario wants none. Timers of an event loop cannot take infinity."""

Broadcast = Callable[[str], Awaitable[object]]
Burst = Callable[[list[str]], Awaitable[object]]


def options() -> dict[str, Any]:
    """Return the options that the scenario sets for this server."""
    found: dict[str, Any] = json.loads(os.environ.get(OPTIONS, "{}"))
    return found


class Ticker:
    """Callback each millisecond that measures its own delay: the longest time for which the loop was blocked.

    It also measures the longest garbage collection, a frequent cause of long stalls.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._handle: asyncio.TimerHandle | None = None
        self._due = 0.0
        self._longest = 0.0
        self._collecting_since = 0.0
        self._longest_collection = 0.0

    def start(self) -> None:
        """Start the timer."""
        if self._handle is None:
            gc.callbacks.append(self._on_collection)
            self._arm()

    def stop(self) -> None:
        """Stop the timer."""
        if self._handle is not None:
            gc.callbacks.remove(self._on_collection)
            self._handle.cancel()
            self._handle = None

    def take(self) -> tuple[float, float]:
        """Return the longest delay and the longest garbage collection since the last call, in seconds."""
        longest, self._longest = max(self._longest, time.monotonic() - self._due), 0.0
        collection, self._longest_collection = self._longest_collection, 0.0
        return max(0.0, longest), collection

    def _on_collection(self, phase: str, _: dict[str, int]) -> None:
        now = time.monotonic()
        if phase == "start":
            self._collecting_since = now
        else:
            self._longest_collection = max(self._longest_collection, now - self._collecting_since)

    def _arm(self) -> None:
        self._due = time.monotonic() + 0.001
        self._handle = self._loop.call_later(0.001, self._tick)

    def _tick(self) -> None:
        self._longest = max(self._longest, time.monotonic() - self._due)
        self._arm()


class Control(asyncio.Protocol):
    """Executor of commands: each `do_...` method is one. Every answer has the CPU seconds of this process too.

    Args:
        broadcast: Sends one text to all clients.
        burst: Sends several texts at once; when left out, one broadcast after the other.
    """

    def __init__(self, broadcast: Broadcast, burst: Burst | None = None) -> None:
        self._broadcast = broadcast
        self._burst = burst or self._one_by_one
        self._messages: list[str] = []
        self._ticker = Ticker()
        self._pending = b""
        self._tasks: set[asyncio.Task[None]] = set()
        self._transport: Any = None

    @classmethod
    async def open(cls, broadcast: Broadcast, port: int, burst: Burst | None = None) -> Control:
        """Open the passed socket and report the port on which clients are served."""
        control = cls(broadcast, burst)
        sock = socket.socket(fileno=int(os.environ[CONTROL_FD]))
        sock.setblocking(False)
        await asyncio.get_running_loop().create_unix_connection(lambda: control, sock=sock)
        control.say({"port": port})
        return control

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def connection_lost(self, _: Exception | None) -> None:
        os._exit(0)

    def data_received(self, data: bytes) -> None:
        *lines, self._pending = (self._pending + data).split(b"\n")
        for line in lines:
            task = asyncio.get_running_loop().create_task(self._answer(json.loads(line)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def say(self, answer: dict[str, Any]) -> None:
        """Write one answer."""
        self._transport.write(json.dumps({**answer, "cpu": time.process_time()}).encode() + b"\n")

    async def _answer(self, command: dict[str, Any]) -> None:
        try:
            answer = await getattr(self, "do_" + command.pop("do"))(**command)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        self.say(answer or {})

    async def _one_by_one(self, messages: list[str]) -> None:
        for message in messages:
            await self._broadcast(message)

    async def do_nothing(self) -> None:
        """Do nothing: measures the cost of a command, and reads the CPU clock."""

    async def do_collect(self, automatic: bool = True) -> dict[str, Any]:
        """Collect garbage, so that each run begins in the same state; report the number of objects that are gone.

        `gc.collect()` itself does not count objects that are freed when it closes a generator. Without `automatic`, no
        further garbage is collected until the next such command.
        """
        gc.unfreeze()
        if automatic:
            gc.enable()
        else:
            gc.disable()
        before = len(gc.get_objects())
        gc.collect()
        return {"found": before - len(gc.get_objects())}

    async def do_prepare(self, kind: str, count: int, size: int) -> dict[str, Any]:
        """Make messages in advance, so that making them is not measured."""
        self._messages = [MAKERS[kind](number, size) for number in range(count)]
        return {"bytes": sum(len(message) for message in self._messages) / count}

    async def do_broadcast(self, number: int) -> None:
        """Send one of the prepared messages to all clients."""
        await self._broadcast(self._messages[number % len(self._messages)])

    async def do_burst(self) -> None:
        """Send all prepared messages to all clients."""
        await self._burst(self._messages)

    async def do_pace(self, count: int, size: int, interval: float) -> dict[str, Any]:
        """Send stamped messages at a steady pace; report the duration of the calls and the growth of memory."""
        await self.do_watch(True)
        before = highest = resident_bytes()
        longest = 0.0
        begun = time.monotonic()
        for number in range(count):
            await asyncio.sleep(max(0.0, begun + number * interval - time.monotonic()))
            message = stamped(size)
            called = time.monotonic()
            await self._broadcast(message)
            longest = max(longest, time.monotonic() - called)
            highest = max(highest, resident_bytes())
        _, collection = self._ticker.take()
        self._ticker.stop()
        return {"longest": longest, "growth": highest - before, "collection": collection}

    async def do_watch(self, on: bool) -> None:
        """Start or stop the measurement of loop delays."""
        gc.collect()
        if on:
            self._ticker.start()
            await asyncio.sleep(0.01)
            self._ticker.take()
        else:
            self._ticker.stop()

    async def do_stall(self) -> dict[str, Any]:
        """Report the longest time for which the loop was blocked since the last such command."""
        longest, collection = self._ticker.take()
        return {"longest": longest, "collection": collection}

    async def do_memory(self) -> dict[str, Any]:
        """Report the memory of this process after everything that can be freed is freed."""
        gc.unfreeze()
        for _ in range(3):
            gc.collect()
        try:
            ctypes.CDLL(None).malloc_trim(0)
        except (OSError, AttributeError):
            pass
        return {"bytes": proportional_bytes()}


def resident_bytes() -> int:
    """Return the resident set of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def proportional_bytes() -> int:
    """Return the proportional set of this process in bytes: shared pages count in part."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return resident_bytes()
