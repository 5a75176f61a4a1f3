"""Dicts in which an application stores data of a client, measured on each write."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from fastapi_ws_stabilizer.memory.budget import Evictable, MemoryBudget
from fastapi_ws_stabilizer.memory.sizing import MAX_OBJECTS, iter_size, size_and_count

_WRITE_LOCK: Final = threading.RLock()
"""Lock for the few steps that store an entry and its size, because functions in threads write too. All dicts share
one lock, because no code waits while it holds it. It is reentrant, because comparing keys may run code of the
application."""

_NOTHING: Final = (0, 0)


class MeteredDict(dict[str, Any]):
    """Dict that measures its memory, and rejects writes above the limit.

    Values are measured deeply when they are written. Growth inside a value is found by the next measurement, after
    `memory_check_interval`. A rejected write changes nothing. At most `MAX_OBJECTS` objects of the whole dict are
    measured, so the duration of a write or a measurement is bounded.

    Args:
        budget: Memory budget that counts it.
        owner: Client that it belongs to.

    Attributes:
        held_bytes: Bytes that it holds.
        counted_bytes: Bytes of it that are in the budget. Only the event loop changes this.
    """

    __slots__ = ("_budget", "_objects", "_sizes", "counted_bytes", "held_bytes", "owner")

    def __init__(
        self, budget: MemoryBudget | None, owner: Evictable | None, values: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self._budget = budget
        self.owner = None if budget is None else owner
        self._sizes: dict[str, tuple[int, int]] = {}  # bytes and objects of each entry
        self._objects = 0
        self.held_bytes = self.counted_bytes = 0
        if values:
            self.update(values)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)

    # ── writing ──

    def __setitem__(self, key: str, value: Any) -> None:
        """Store an entry.

        Raises:
            MemoryLimitExceededError: The value exceeds a memory limit.
        """
        self._put({key: value})

    def update(self, *args: Any, **added: Any) -> None:
        """Store several entries, or none of them.

        Raises:
            MemoryLimitExceededError: The values exceed a memory limit.
        """
        self._put(dict(*args, **added))

    def replace(self, values: Mapping[str, Any]) -> None:
        """Replace all entries by these, or change nothing.

        Raises:
            MemoryLimitExceededError: The values exceed a memory limit.
        """
        self._put(dict(values), replace_all=True)

    def _put(self, values: dict[str, Any], *, replace_all: bool = False) -> None:
        known = [self._sizes.get(key, _NOTHING) for key in values]
        before = self.held_bytes if replace_all else sum(size for size, _ in known)
        remaining = MAX_OBJECTS - (0 if replace_all else self._objects - sum(count for _, count in known))
        sizes: dict[str, tuple[int, int]] = {}
        for key, value in values.items():
            size, count = size_and_count(value, remaining)
            sizes[key] = sys.getsizeof(key) + size, count
            remaining -= count
        if self._budget is not None:
            self._budget.ensure_room(self.owner, sum(size for size, _ in sizes.values()) - before)
        with _WRITE_LOCK:
            if replace_all:
                super().clear()
                self._record_sizes({}, removed=list(self._sizes))
            super().update(values)
            self._record_sizes(sizes)
        self._changed()

    def __ior__(self, values: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> MeteredDict:  # type: ignore[override, misc]
        self.update(values)
        return self

    def setdefault(self, key: str, default: Any = None) -> Any:
        """Return the value of a key. Store and return `default` if there is none.

        Raises:
            MemoryLimitExceededError: The value exceeds a memory limit.
        """
        if key not in self:
            self[key] = default
        return self[key]

    # ── removing ──

    def __delitem__(self, key: str) -> None:
        with _WRITE_LOCK:
            super().__delitem__(key)
            self._record_sizes({}, removed=[key])
        self._changed()

    def pop(self, key: str, *default: Any) -> Any:
        """Remove an entry and return its value."""
        with _WRITE_LOCK:
            value = super().pop(key, *default)
            self._record_sizes({}, removed=[key])
        self._changed()
        return value

    def popitem(self) -> tuple[str, Any]:
        """Remove and return the entry that was stored last."""
        with _WRITE_LOCK:
            key, value = super().popitem()
            self._record_sizes({}, removed=[key])
        self._changed()
        return key, value

    def clear(self) -> None:
        """Remove all entries."""
        with _WRITE_LOCK:
            super().clear()
            self._record_sizes({}, removed=list(self._sizes))
        self._changed()

    # ── counting ──

    def _record_sizes(self, sizes: Mapping[str, tuple[int, int]], removed: Iterable[str] = ()) -> None:
        """Record the sizes of stored entries, and forget those of removed ones."""
        for key in (*removed, *sizes):
            size, count = self._sizes.pop(key, _NOTHING)
            self.held_bytes -= size
            self._objects -= count
        for key, (size, count) in sizes.items():
            self.held_bytes += size
            self._objects += count
            self._sizes[key] = size, count

    def _changed(self) -> None:
        budget = self._budget  # `detach` may clear it while a thread writes
        if budget is not None:
            budget.changed(self)

    def flush_accounting(self) -> int:
        """Move the uncounted bytes into the budget; return their number. Event loop only."""
        held = 0 if self._budget is None else self.held_bytes
        added, self.counted_bytes = held - self.counted_bytes, held
        return added

    def remeasure(self) -> Iterator[None]:
        """Measure all entries again, a part of an entry per step: values may have changed inside."""
        for key, value in list(self.items()):
            known = self._sizes.get(key, _NOTHING)[1]
            size, count = yield from iter_size(value, MAX_OBJECTS - self._objects + known)
            with _WRITE_LOCK:
                if self.get(key) is value:
                    self._record_sizes({key: (sys.getsizeof(key) + size, count)})
            self._changed()
            yield
        if self._budget is not None and self.owner is not None:
            self._budget.check_limit(self.owner)

    def stop_accounting(self) -> None:
        """Stop counting it for its owner. Code that still holds it can use it."""
        budget, self._budget = self._budget, None
        self.owner = None
        if budget is not None:
            budget.changed(self)
