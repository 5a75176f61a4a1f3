"""Tables for readers: the figures, the machine, and which bars are met."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from benchmarks.bars import BARS
from benchmarks.figures import BUSY, Row, Table

_PACKAGES = (
    "fastapi-ws-stabilizer",
    "fastapi",
    "starlette",
    "uvicorn",
    "uvloop",
    "websockets",
    "h11",
    "pydantic",
)
_PEERS = (
    "fastapi-websocket-stabilizer",
    "python-socketio",
    "litestar",
    "chanx",
    "fast-channels",
    "channel-box",
    "picows",
    *_PACKAGES[1:],
)
_ASK = (
    "import importlib.metadata as m, json, platform, sys\n"
    "found = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
    "print(json.dumps([platform.python_version(), {n: found.get(n) for n in sys.argv[1:]}]))"
)

NOTES = """\
- Figures are medians of alternating runs (A B C, A B C, ...); ratios are what can be compared between machines.
- Server CPU is the process's own clock, user and system. What the control commands cost was measured and taken off.
- All servers run on uvloop, one process each; all ASGI apps on uvicorn with the same options: h11, no access log, and
  uvicorn's own pings off. Compression is offered by the clients where a table says so, and nowhere else.
- The clients are one further process for each server, which reads with epoll. *Load* is the most of a core that it
  used. Where that is marked, rates and delays may be the load's own; CPU per message is the server's in any case.
- Garbage is collected before each run; what the collector does during it is part of the figure.
"""


def machine() -> Iterator[str]:
    """Return lines that describe the machine."""
    yield f"- Machine: {_cpu_model()}, {os.cpu_count()} cores, {_memory_gib():.0f} GiB"
    yield f"- Kernel: {platform.system()} {platform.release()}"


def versions(peers_python: Path) -> Iterator[str]:
    """Return lines with the versions of the contenders."""
    for title, python, names in (
        ("The library's environment", sys.executable, _PACKAGES),
        ("The peers' environment", str(peers_python), _PEERS),
    ):
        try:
            answer = subprocess.run(
                [python, "-c", _ASK, *names], capture_output=True, text=True, check=True, timeout=60
            )
        except (OSError, subprocess.SubprocessError):
            yield f"- {title}: none"
            continue
        version, found = json.loads(answer.stdout)
        listed = ", ".join(f"{name} {found[name]}" for name in names if found[name])
        yield f"- {title}: Python {version}; {listed}"


def table_lines(table: Table) -> Iterator[str]:
    """Return one figure as a Markdown table."""
    yield f"## {table.title}"
    yield ""
    yield table.how
    yield ""
    base = table.median(table.baseline)
    titles = ["", f"median ({table.unit})", "min", "max", "load", "notes"]
    if base:
        titles.insert(4, f"/ {table.rows[table.baseline].title.split(' (')[0]}")
    yield from _grid(titles, [_cells(table, row, base) for row in table.rows.values()])


def bar_lines(tables: Iterable[Table]) -> Iterator[str]:
    """Return lines that say which bars are met."""
    by_key = {table.key: table for table in tables}
    rows = []
    for bar in BARS:
        value = bar.measured(by_key)
        bound = f"{'≥' if bar.at_least else '≤'} {_number(bar.limit, 2)} {bar.unit}".strip()
        if value is None:
            rows.append([bar.figure, bound, "", "not measured"])
        else:
            measured = f"{_number(value, 2)} {bar.unit}".strip()
            rows.append([bar.figure, bound, measured, "met" if bar.met(value) else "**not met**"])
    yield "## Bars"
    yield ""
    yield from _grid(["figure", "bar", "measured", ""], rows)


def document(head: Sequence[str], tables: Sequence[Table]) -> str:
    """Return the whole report."""
    lines = ["# Benchmarks", "", *head, "", NOTES]
    for table in tables:
        lines += [*table_lines(table), ""]
    lines += bar_lines(tables)
    return "\n".join(lines) + "\n"


def _cells(table: Table, row: Row, base: float | None) -> list[str]:
    load = f"{100 * row.load_share:.0f} %" if row.load_share else ""
    if row.load_share > BUSY:
        load = f"**{load}: too busy**"
    notes = "; ".join(row.notes.values()).replace("|", "\\|")
    median = row.median
    if median is None:
        return [row.title, "", "", "", *([""] if base else []), load, notes or "not measured"]
    cells = [row.title, *(_number(value, table.digits) for value in (median, min(row.values), max(row.values)))]
    if base:
        cells.append(f"{median / base:.3f}" if median / base < 0.1 else f"{median / base:.2f}")
    return [*cells, load, notes]


def _number(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}"


def _grid(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(cell) for cell in column) for column in zip(titles, *rows, strict=True)]
    for cells in (titles, ["-" * width for width in widths], *rows):
        yield "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
