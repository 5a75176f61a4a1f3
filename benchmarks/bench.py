"""Execution of a scenario: its contenders, its size, its runs, and their order."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.contenders import Contender
from benchmarks.figures import Table, failed
from benchmarks.processes import ContenderError, Stand


@dataclass(frozen=True)
class Scale:
    """Sizes of the scenarios. Seconds are the approximate duration of one run of one contender."""

    fanout_clients: int = 1000
    fanout_seconds: float = 0.6
    compressed_clients: int = 500
    echo_clients: int = 200
    echo_seconds: float = 3.0
    slow_messages_before: int = 75
    slow_messages: int = 200
    stall_clients: int = 5000
    stall_broadcasts: int = 20
    memory_clients: int = 2000
    heartbeat_clients: int = 1000
    heartbeat_seconds: float = 3.0
    churn_connections: int = 1000
    storm_clients: int = 10_000


FULL = Scale()
QUICK = Scale(
    fanout_clients=300,
    fanout_seconds=0.2,
    compressed_clients=100,
    echo_clients=50,
    echo_seconds=1.0,
    slow_messages_before=30,
    slow_messages=200,
    stall_clients=1000,
    stall_broadcasts=10,
    memory_clients=500,
    heartbeat_clients=200,
    heartbeat_seconds=2.0,
    churn_connections=300,
    storm_clients=2000,
)


class Bench:
    """One run of the benchmarks.

    Args:
        scale: Sizes of the scenarios.
        runs: Number of runs of each contender.
        peers_python: Interpreter of the environment of the peers.
        names: Contenders that take part; all if empty.
    """

    def __init__(self, scale: Scale, runs: int, peers_python: Path, names: Iterable[str] = ()) -> None:
        self.scale = scale
        self.runs = runs
        self._peers_python = peers_python
        self._names = frozenset(names)

    def say(self, text: str) -> None:
        """Print the progress."""
        print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)

    def stand(self, contender: Contender) -> Stand:
        """Start a contender.

        Raises:
            ContenderError: The contender cannot be started.
        """
        if contender.peer and not self._peers_python.exists():
            raise ContenderError("the environment of the peers is missing; `make bench` creates it")
        python = str(self._peers_python) if contender.peer else sys.executable
        return Stand(contender, python, sys.executable)

    def alternate(
        self,
        contenders: Sequence[Contender],
        tables: Sequence[Table],
        prepare: Callable[[Stand], None],
        measure: Callable[[Stand], None],
    ) -> None:
        """Start all contenders, prepare each once, and measure them alternately: A B C, A B C, ...

        The tables name a contender that fails, and it takes no further part.
        """
        with self._together(contenders, tables) as stands:
            for stand in tuple(stands):
                self._try(stand, stands, tables, prepare)
            for run in range(self.runs):
                for stand in tuple(stands):
                    self.say(f"run {run + 1} of {self.runs}: {stand.contender.title}")
                    self._try(stand, stands, tables, measure)

    def afresh(
        self, contenders: Sequence[Contender], tables: Sequence[Table], measure: Callable[[Stand], None]
    ) -> None:
        """Measure the contenders alternately, each time in a new process, where earlier runs would matter."""
        left = self._chosen(contenders)
        for run in range(self.runs):
            for contender in tuple(left):
                self.say(f"run {run + 1} of {self.runs}: {contender.title}")
                try:
                    with self.stand(contender) as stand:
                        measure(stand)
                except ContenderError as error:
                    failed(tables, contender, str(error))
                    left.remove(contender)

    @contextmanager
    def _together(self, contenders: Sequence[Contender], tables: Sequence[Table]) -> Iterator[list[Stand]]:
        with ExitStack() as stack:
            stands: list[Stand] = []
            for contender in self._chosen(contenders):
                for table in tables:
                    table.row(contender)
                try:
                    stands.append(stack.enter_context(self.stand(contender)))
                except ContenderError as error:
                    failed(tables, contender, str(error))
            yield stands

    def _try(self, stand: Stand, stands: list[Stand], tables: Sequence[Table], step: Callable[[Stand], None]) -> None:
        try:
            step(stand)
        except ContenderError as error:
            self.say(f"{stand.contender.title}: {error}")
            failed(tables, stand.contender, str(error))
            stands.remove(stand)
            stand.stop()

    def _chosen(self, contenders: Sequence[Contender]) -> list[Contender]:
        return [contender for contender in contenders if not self._names or contender.name in self._names]
