"""Fuzz one target, or all of them, with atheris: `python -m tests.fuzz frames --seconds 600`.

An input that breaks a rule, takes too long or makes the process grow is written to `.fuzz/<target>/`. After the fix,
move the input to `tests/fuzz/corpus/<target>/`, where `test_found.py` replays it in every run.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

SEEDS: Final = Path(__file__).parent / "corpus"
WORK: Final = Path(".fuzz")
"""Directory for what the fuzzers learn from run to run, and for the inputs that fail."""

TOTAL: Final = 600
"""Default duration for all targets together, in seconds."""

JOBS: Final = 2
TIMEOUT: Final = 10
"""Timeout for one input, in seconds; the slowest known input takes a tenth of a second."""

MAX_BYTES: Final = 4096
MAX_MIB: Final = 2048

INSTRUMENTED: Final = ["fastapi_ws_stabilizer", "websockets", "uvicorn.protocols"]


def fuzz(target: str, seconds: int) -> None:
    """Fuzz one target in this process, and end the process with it."""
    try:
        import atheris
    except ImportError:
        sys.exit("the fuzzers need atheris, which is there for CPython 3.11: make fuzz PYTHON=python3.11")
    logging.disable(logging.CRITICAL)
    with atheris.instrument_imports(include=INSTRUMENTED):
        from tests.fuzz.growth import GrowthWatch
        from tests.fuzz.table import TARGETS
    run = TARGETS[target]
    watch = GrowthWatch(seconds, time.monotonic)
    count = 0

    def one_input(data: bytes) -> None:
        nonlocal count
        count += 1
        run(data)
        looked = len(watch.blocks)
        watch.look()
        if len(watch.blocks) > looked:
            print(f"{target}: {count} inputs, {watch}", file=sys.stderr, flush=True)

    learnt = WORK / target / "corpus"
    learnt.mkdir(parents=True, exist_ok=True)
    options = [
        f"-max_total_time={seconds}",
        f"-timeout={TIMEOUT}",
        f"-rss_limit_mb={MAX_MIB}",
        f"-max_len={MAX_BYTES}",
        f"-artifact_prefix={WORK / target}/",
        f"-dict={SEEDS.parent / 'dictionary.txt'}",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, str(learnt), str(SEEDS / target)], one_input)
    atheris.Fuzz()


def fuzz_all(targets: list[str], seconds: int, jobs: int) -> int:
    """Fuzz several targets, each in its own process; return how many of them failed."""
    with ThreadPoolExecutor(jobs) as pool:
        codes = list(pool.map(lambda target: _fuzz_apart(target, seconds), targets))
    bad = [target for target, code in zip(targets, codes, strict=True) if code]
    if bad:
        print(f"found something: {', '.join(bad)}; the inputs are in {WORK}/<target>/, with the log of the run")
    return len(bad)


def _fuzz_apart(target: str, seconds: int) -> int:
    log = WORK / target / "log"
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{target}: {seconds} seconds", flush=True)
    with log.open("wb") as output:
        command = [sys.executable, "-m", "tests.fuzz", target, "--seconds", str(seconds)]
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
    print(_result_of(target, code), flush=True)
    return code


def _result_of(target: str, code: int) -> str:
    lines = (WORK / target / "log").read_text(encoding="utf-8", errors="replace").splitlines()
    measured = [line for line in lines if line.startswith(f"{target}: ")]
    if not code:
        return measured[-1] if measured else f"{target}: nothing found"
    return "\n".join([f"{target}: FOUND SOMETHING", *lines[-40:]])


def main() -> None:
    """Parse the command line, and fuzz."""
    names = sorted(path.name for path in SEEDS.iterdir() if path.is_dir())
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz the library.")
    parser.add_argument("target", nargs="?", choices=[*names, "all"], default="all")
    parser.add_argument("--seconds", type=int, help=f"for each target; {TOTAL} for all together when left out")
    parser.add_argument("--jobs", type=int, default=JOBS, help="how many targets at the same time")
    options = parser.parse_args()
    seconds = options.seconds or max(1, TOTAL * options.jobs // len(names))
    if options.target == "all":
        sys.exit(min(1, fuzz_all(names, seconds, options.jobs)))
    fuzz(options.target, seconds)


if __name__ == "__main__":
    main()
