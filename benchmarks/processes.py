"""Start, control and cleanup of the servers and the loads."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from typing_extensions import Self

from benchmarks.channel import CONTROL_FD, OPTIONS, WS, Channel, ChannelClosed
from benchmarks.contenders import Contender

ROOT = Path(__file__).parent.parent
START_TIMEOUT = 30.0
ANSWER_TIMEOUT = 90.0
IDLE_SECONDS = 0.5
IDLE_SHARE = 0.1
"""Share of a core below which a server is idle. The measurement of loop delays uses a small part of it."""


class ContenderError(Exception):
    """A contender cannot take part, or cannot continue. The text gives the reason."""


class Process:
    """A child with a channel. It ends when the channel is closed, but `stop` does not rely on that.

    Args:
        module: The module that it runs.
        python: The interpreter, which decides the environment.
        environment: Further environment variables.
    """

    def __init__(self, module: str, python: str, environment: dict[str, str] | None = None) -> None:
        ours, theirs = socket.socketpair()
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed in stop)
        with theirs:
            self._child = subprocess.Popen(
                [python, "-m", module],
                cwd=ROOT,
                env={**os.environ, **(environment or {}), CONTROL_FD: str(theirs.fileno())},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the parent, which stops its children itself
            )
        self._channel = Channel(ours)

    def begin(self, do: str, **arguments: Any) -> None:
        """Send a command without waiting for its answer.

        Raises:
            ContenderError: The process has ended.
        """
        try:
            self._channel.send({"do": do, **arguments})
        except ChannelClosed:
            raise ContenderError(self._last_words()) from None

    def finish(self, timeout: float = ANSWER_TIMEOUT) -> dict[str, Any]:
        """Wait for an answer.

        Raises:
            ContenderError: The process has ended, has not answered in time, or answered with an error.
        """
        try:
            answer = self._channel.receive(timeout)
        except ChannelClosed:
            raise ContenderError(self._last_words()) from None
        except TimeoutError:
            raise ContenderError(f"no answer within {timeout:.0f} s") from None
        if "error" in answer:
            raise ContenderError(str(answer["error"]))
        return answer

    def call(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self.begin(do, **arguments)
        return self.finish()

    def stop(self) -> None:
        """Kill the process. Nothing in it needs a clean exit."""
        self._channel.close()
        try:
            os.killpg(self._child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._child.wait()
        self._log.close()

    def _last_words(self) -> str:
        try:
            self._child.wait(2)
        except subprocess.TimeoutExpired:
            pass
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().splitlines() if line.strip()]
        return f"ended: {lines[-1][:160]}" if lines else "ended without a word"


class Stand:
    """A contender's server, and the load that plays its clients.

    Raises:
        ContenderError: The server does not start, for instance because a package is missing.
    """

    def __init__(self, contender: Contender, server_python: str, load_python: str) -> None:
        self.contender = contender
        self._load_cpu = 0.0
        self._load_wall = 0.0
        environment = {OPTIONS: json.dumps(contender.options), WS: contender.ws}
        self.server = Process(f"benchmarks.apps.{contender.app}", server_python, environment)
        try:
            self.load = Process("benchmarks.load", load_python)
            try:
                self.port = self.server.finish(START_TIMEOUT)["port"]
            except BaseException:
                self.load.stop()
                raise
        except BaseException:
            self.server.stop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop both processes."""
        self.load.stop()
        self.server.stop()

    def connect(self, count: int, **options: Any) -> dict[str, Any]:
        """Connect that many clients.

        Raises:
            ContenderError: Not all of them could connect.
        """
        where = self.contender
        how = {"path": where.path, "hello": where.hello, "subprotocol": where.subprotocol}
        return self.load.call("connect", count=count, port=self.port, **how, **options)

    def cpu(self) -> float:
        """Return the CPU seconds of the server since its start."""
        return float(self.server.call("nothing")["cpu"])

    def command_cost(self, count: int = 50) -> float:
        """Return the CPU seconds of a command that does nothing, to subtract them from the cost of other commands."""
        begun = self.cpu()
        for _ in range(count - 1):
            self.server.call("nothing")
        return (self.cpu() - begun) / count

    def wait_until_idle(self, timeout: float = 30.0) -> None:
        """Wait until the server has done what it has to do.

        Raises:
            ContenderError: It is busy for too long.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            before = self.cpu()
            time.sleep(IDLE_SECONDS)
            if self.cpu() - before < IDLE_SHARE * IDLE_SECONDS:
                return
        raise ContenderError(f"still busy after {timeout:.0f} s")

    def loaded(self) -> dict[str, Any]:
        """Wait for the answer of the load, and note its CPU share."""
        answer = self.load.finish()
        self._load_cpu += answer["load_cpu"]
        self._load_wall += answer["load_wall"]
        return answer

    def take_load_share(self) -> float:
        """Return the highest share of a core that the load used since the last call."""
        share = self._load_cpu / self._load_wall if self._load_wall else 0.0
        self._load_cpu = self._load_wall = 0.0
        return share
