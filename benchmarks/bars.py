"""Performance targets: one bar for each promise about speed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from benchmarks.contenders import (
    BARE,
    BARE_DEPENDENCY,
    PLAIN,
    PLAIN_V1,
    PROTOCOL,
    PROTOCOL_V1,
    RAW,
    REFERENCE,
    WEBSOCKETS,
    Contender,
)
from benchmarks.figures import Table
from benchmarks.scenarios.isolation import SLOW_CLIENTS, SLOW_LIMIT_BYTES, sharded
from benchmarks.scenarios.storms import PACED_BARE

Tables = Mapping[str, Table]

LONGER_CALL_MILLISECONDS: Final = 50.0
"""Factor by which stalled clients may slow a call of `broadcast()` down. Waiting for one of them would take seconds."""

VISIBLY: Final = 1.5
"""Factor from which a longer stall is called visibly longer."""


@dataclass(frozen=True)
class Bar:
    """One promise.

    Attributes:
        figure: What is measured.
        measured: Finds the value in the tables; `None` if a part of it was not measured.
        limit: Highest or lowest value allowed.
        unit: Unit of the value and the limit.
        at_least: Whether the limit is the lowest value allowed.
    """

    figure: str
    measured: Callable[[Tables], float | None]
    limit: float
    unit: str = ""
    at_least: bool = False

    def met(self, value: float) -> bool:
        """Return whether a measured value meets the bar."""
        return value >= self.limit if self.at_least else value <= self.limit


def _ratio(table: str, one: Contender, other: Contender) -> Callable[[Tables], float | None]:
    return lambda tables: tables[table].ratio(one.key, other.key) if table in tables else None


def _median(table: str, key: str) -> Callable[[Tables], float | None]:
    return lambda tables: tables[table].median(key) if table in tables else None


def _above(table: str, one: str, other: str) -> Callable[[Tables], float | None]:
    def difference(tables: Tables) -> float | None:
        mine, theirs = _median(table, one)(tables), _median(table, other)(tables)
        return None if mine is None or theirs is None else mine - theirs

    return difference


def _worst(table: str, key: str) -> Callable[[Tables], float | None]:
    def highest(tables: Tables) -> float | None:
        row = tables[table].rows.get(key) if table in tables else None
        return max(row.values) if row is not None and row.values else None

    return highest


def _each(contender: Contender, name: str) -> tuple[Bar, ...]:
    """Return the bars that apply to both configurations of the library."""
    many, one = sharded(contender)
    reading, stopped = contender.using("all read").key, contender.using(f"{SLOW_CLIENTS} stopped").key
    return (
        Bar(f"longest loop stall, 5,000 clients, {name}", _median("stall", many.key), 15.0, "ms"),
        Bar(
            f"the same with `num_shards=1`, {name}: visibly longer",
            _ratio("stall", one, many),
            VISIBLY,
            at_least=True,
        ),
        Bar(
            f"slow clients, {name}: others that missed something", _worst("slow-missed", contender.key), 0.0, "clients"
        ),
        Bar(f"slow clients, {name}: p99 delay with / without", _median("slow-ratio", contender.key), 1.3),
        Bar(
            f"slow clients, {name}: longest `broadcast()` above that without",
            _above("slow-call", stopped, reading),
            LONGER_CALL_MILLISECONDS,
            "ms",
        ),
        Bar(
            f"slow clients, {name}: memory within the limits",
            _median("slow-memory", contender.key),
            SLOW_LIMIT_BYTES / 1024,
            "KiB",
        ),
        Bar(f"storm, {name}: longest loop stall connecting", _median("storm-connecting", contender.key), 30.0, "ms"),
        Bar(f"storm, {name}: longest loop stall disconnecting", _median("storm-vanishing", contender.key), 60.0, "ms"),
        Bar(
            f"storm, {name}: objects left to the collector above bare endpoint",
            _above("storm-garbage", contender.key, BARE_DEPENDENCY.key),
            1.0,
            "objects",
        ),
    )


BARS: Final = (
    Bar("broadcast, plain uvicorn / the reference", _ratio("fanout", PLAIN, REFERENCE), 0.50),
    Bar("broadcast, protocol class / the reference", _ratio("fanout", PROTOCOL, REFERENCE), 0.20),
    Bar("broadcast, protocol class / `websockets.broadcast`", _ratio("fanout", PROTOCOL, WEBSOCKETS), 0.90),
    Bar("broadcast, protocol class / the raw limit", _ratio("fanout", PROTOCOL, RAW), 1.25),
    Bar("burst, protocol class / the reference", _ratio("burst", PROTOCOL, REFERENCE), 0.04),
    Bar("compressed 1 KiB, protocol class / the reference", _ratio("compressed-1k", PROTOCOL, REFERENCE), 0.35),
    Bar("echo, plain uvicorn / bare endpoint", _ratio("echo", PLAIN, BARE), 0.85, at_least=True),
    Bar("echo, protocol class / bare endpoint", _ratio("echo", PROTOCOL, BARE), 1.1, at_least=True),
    Bar("idle connection above bare endpoint, plain uvicorn", _above("memory", PLAIN.key, BARE.key), 6.0, "KiB"),
    Bar("idle connection above bare endpoint, protocol class", _above("memory", PROTOCOL.key, BARE.key), 0.0, "KiB"),
    Bar("idle v1 connection, plain uvicorn", _median("memory", PLAIN_V1.key), 33.0, "KiB"),
    Bar("idle v1 connection, protocol class", _median("memory", PROTOCOL_V1.key), 26.0, "KiB"),
    Bar("10,000 connected v1 clients, plain uvicorn", _median("resumable", PLAIN_V1.key), 300.0, "MiB"),
    Bar("10,000 connected v1 clients, protocol class", _median("resumable", PROTOCOL_V1.key), 300.0, "MiB"),
    Bar("10,000 v1 clients that are away, plain uvicorn", _median("resumable-away", PLAIN_V1.key), 300.0, "MiB"),
    Bar("10,000 v1 clients that are away, protocol class", _median("resumable-away", PROTOCOL_V1.key), 300.0, "MiB"),
    Bar("broadcast to v1 / to plain clients, plain uvicorn", _ratio("sessions", PLAIN_V1, PLAIN), 1.15),
    Bar("broadcast to v1 / to plain clients, protocol class", _ratio("sessions", PROTOCOL_V1, PROTOCOL), 1.15),
    Bar("storm, CPU of a connect, plain uvicorn / bare endpoint", _ratio("storm-cpu", PLAIN, BARE_DEPENDENCY), 0.85),
    Bar("the same with the collector paced for both", _ratio("storm-cpu", PLAIN, PACED_BARE), 1.25),
    Bar(
        "storm, CPU of a connect, protocol class / bare endpoint", _ratio("storm-cpu", PROTOCOL, BARE_DEPENDENCY), 0.75
    ),
    Bar("the same with the collector paced for both, protocol class", _ratio("storm-cpu", PROTOCOL, PACED_BARE), 1.0),
    *_each(PLAIN, "plain uvicorn"),
    *_each(PROTOCOL, "protocol class"),
)
