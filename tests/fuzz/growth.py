"""Detection of a process that keeps growing while it repeats the same work."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

SAMPLES: Final = 24
"""Number of measurements in a run; the first half is the warm-up."""

MAX_BLOCKS: Final = 20_000
"""Blocks of Python's memory that the second half of a run may add, because caches fill late."""

MAX_RESIDENT: Final = 256 * 1024 * 1024
"""Bytes of memory that the second half may add: the fuzzer itself keeps every input that reaches new code."""


class GrowingError(AssertionError):
    """Memory has grown through all of the second half."""


class GrowthWatch:
    """Periodic measurement of the memory of this process.

    Args:
        seconds: Duration of the run.
        clock: Clock that measures it.
    """

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._interval = seconds / SAMPLES
        self._next = clock() + self._interval
        self.blocks: list[int] = []
        self.resident: list[int] = []

    def look(self) -> None:
        """Measure if a measurement is due.

        Raises:
            GrowingError: Memory grows, and does not stop.
        """
        if self._clock() < self._next:
            return
        self._next = self._clock() + self._interval
        gc.collect()
        self.note(sys.getallocatedblocks(), resident_bytes())

    def note(self, blocks: int, resident: int) -> None:
        """Record a measurement.

        Raises:
            GrowingError: Memory grows, and does not stop.
        """
        self.blocks.append(blocks)
        self.resident.append(resident)
        for unit, values, most in (("blocks", self.blocks, MAX_BLOCKS), ("bytes", self.resident, MAX_RESIDENT)):
            late = values[SAMPLES // 2 :]
            # A leak continues to the end. A cache or a page that fills grows in steps and then stops.
            if len(late) >= SAMPLES // 4 and late[-1] - late[0] > most and late[-1] == max(late):
                raise GrowingError(f"memory grows: {late} {unit}")

    def __str__(self) -> str:
        if not self.blocks:
            return "not measured"
        middle = min(SAMPLES // 2, len(self.blocks) - 1)
        return (
            f"blocks {self.blocks[0]} {self.blocks[middle]} {self.blocks[-1]}, "
            f"MiB {self.resident[0] >> 20} {self.resident[middle] >> 20} {self.resident[-1] >> 20}"
        )


def resident_bytes() -> int:
    """Return the resident memory of this process in bytes; 0 where the system does not report it."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096
    except OSError:
        return 0
