"""Measured figures: a table for each figure, a row for each contender, a value for each run."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field

from benchmarks.contenders import Contender

BUSY = 0.9
"""Share of a core above which the load may have been the bottleneck."""


@dataclass
class Row:
    """The values of one contender.

    Attributes:
        title: Its name for readers.
        values: One for each run.
        load_share: Highest share of a core that the load used in a run.
        notes: Remarks, by subject.
    """

    title: str
    values: list[float] = field(default_factory=list)
    load_share: float = 0.0
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def median(self) -> float | None:
        """Median of the values; `None` if there are none."""
        return statistics.median(self.values) if self.values else None

    def note(self, about: str, text: str) -> None:
        """Add a remark; it replaces an earlier one about the same subject."""
        self.notes[about] = text


@dataclass
class Table:
    """One figure of all contenders.

    Attributes:
        key: Name in the bars.
        title: Its heading.
        unit: Unit of its values.
        how: How it was measured.
        baseline: Key of the row that ratios are relative to.
        digits: Digits after the decimal point.
    """

    key: str
    title: str
    unit: str
    how: str
    baseline: str
    digits: int = 2
    rows: dict[str, Row] = field(default_factory=dict)

    def row(self, contender: Contender) -> Row:
        """Return the row of a contender, created when missing."""
        return self.rows.setdefault(contender.key, Row(contender.title))

    def add(self, contender: Contender, value: float, load_share: float = 0.0) -> None:
        """Add the value of one run."""
        row = self.row(contender)
        row.values.append(value)
        row.load_share = max(row.load_share, load_share)

    def median(self, key: str) -> float | None:
        """Return the median of a row; `None` if it was not measured."""
        row = self.rows.get(key)
        return None if row is None else row.median

    def ratio(self, key: str, to: str) -> float | None:
        """Return the ratio of two medians; `None` if one was not measured."""
        mine, other = self.median(key), self.median(to)
        return mine / other if mine is not None and other else None


def failed(tables: Iterable[Table], contender: Contender, reason: str) -> None:
    """Write into each table why a contender has no value, or no further ones."""
    for table in tables:
        table.row(contender).note("failure", reason)
