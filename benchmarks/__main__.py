"""Command line: `python -m benchmarks --help`."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

from benchmarks.bench import FULL, QUICK, Bench
from benchmarks.contenders import ALL
from benchmarks.figures import Table
from benchmarks.processes import ROOT
from benchmarks.report import bar_lines, document, machine, table_lines, versions
from benchmarks.scenarios.broadcasts import burst, compressed, fanout, sessions
from benchmarks.scenarios.connections import connect, heartbeat, memory, resumable
from benchmarks.scenarios.echo import echo
from benchmarks.scenarios.isolation import slow, stall
from benchmarks.scenarios.storms import storm

RESULTS = Path(__file__).parent / "RESULTS.md"
PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
FULL_RUNS = 5
QUICK_RUNS = 2

SCENARIOS: dict[str, Callable[[Bench], list[Table]]] = {
    "fanout": fanout,
    "sessions": sessions,
    "burst": burst,
    "compressed": compressed,
    "echo": echo,
    "slow": slow,
    "stall": stall,
    "memory": memory,
    "resumable": resumable,
    "heartbeat": heartbeat,
    "connect": connect,
    "storm": storm,
}


def main() -> None:
    """Run the selected scenarios, print the report, and write it to a file after a full run."""
    if not sys.platform.startswith("linux"):
        sys.exit("the benchmarks need Linux: epoll, and /proc for memory")
    asked = _arguments()
    signal.signal(signal.SIGTERM, _exit)
    whole = not (asked.quick or asked.only or asked.contenders)
    runs = asked.runs or (QUICK_RUNS if asked.quick else FULL_RUNS)
    bench = Bench(QUICK if asked.quick else FULL, runs, asked.peers_python.absolute(), asked.contenders)
    begun = time.monotonic()
    head = [*machine(), *versions(asked.peers_python), f"- Runs of each contender: {runs}"]
    if asked.quick:
        head.append("- **Quick**: fewer clients and shorter runs; not to be quoted")
    print("\n".join(head))
    tables: list[Table] = []
    for name, scenario in SCENARIOS.items():
        if asked.only and name not in asked.only:
            continue
        bench.say(name)
        for table in scenario(bench):
            tables.append(table)
            print("\n" + "\n".join(table_lines(table)), flush=True)
    print("\n" + "\n".join(bar_lines(tables)))
    minutes = (time.monotonic() - begun) / 60
    print(f"\n{minutes:.1f} minutes")
    if whole or asked.write:
        RESULTS.write_text(document([*head, f"- Took {minutes:.0f} minutes on {time.strftime('%Y-%m-%d')}"], tables))
        print(f"written to {RESULTS.relative_to(ROOT)}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure the library beside its peers.")
    parser.add_argument("--quick", action="store_true", help="fewer clients and runs, about four minutes")
    parser.add_argument(
        "--only", type=_names(SCENARIOS), default=[], help="scenarios, with commas: " + ", ".join(SCENARIOS)
    )
    parser.add_argument(
        "--contenders",
        type=_names(contender.name for contender in ALL),
        default=[],
        help="contenders, with commas: " + ", ".join(contender.name for contender in ALL),
    )
    parser.add_argument("--runs", type=int, help=f"runs of each contender: {FULL_RUNS}, or {QUICK_RUNS} if quick")
    parser.add_argument("--write", action="store_true", help="write RESULTS.md even if not everything was measured")
    parser.add_argument("--peers-python", type=Path, default=PEERS_PYTHON, help="interpreter of the peers' environment")
    asked = parser.parse_args()
    if asked.runs is not None and asked.runs < 1:
        parser.error("--runs must be at least 1")
    return asked


def _names(known: Iterable[str]) -> Callable[[str], list[str]]:
    allowed = list(known)

    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"no {name!r}; there are {', '.join(allowed)}")
        return names

    return parse


def _exit(*_: object) -> NoReturn:
    sys.exit(143)  # so that child processes are stopped on exit


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
