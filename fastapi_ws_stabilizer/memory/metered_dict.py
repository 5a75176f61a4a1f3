"""The dicts in which an application keeps things for a client, measured as they are filled."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from fastapi_ws_stabilizer.memory.budget import Evictable, MemoryBudget
from fastapi_ws_stabilizer.memory.sizing import MAX_OBJECTS, iter_size, size_and_count

_WRITING: Final = threading.RLock()
"""Held for the few steps that put an entry in and note its size: functions in threads write too. One for all dicts, for
they never wait in it; and by one thread more than once, for keys may compare in code of the application's."""

_NOTHING: Final = (0, 0)


class MeteredDict(dict[str, Any]):
    """A dict that knows how much memory it holds, and takes no more than may be.

    What is put into it is measured deeply. What grows inside a value later is found at the next look, after
    `memory_check_interval`. A write that is refused changes nothing. No more than `MAX_OBJECTS` are looked at in all of
    it, so that neither a write nor a look takes longer for more entries.

    Args:
        budget: Where it is counted.
        owner: For whom it is kept.

    Attributes:
        held_bytes: How much it holds.
        counted_bytes: How much of that is in the ledger. Only the event loop touches it.
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
        """Put an entry in.

        Raises:
            MemoryLimitExceededError: That would be more than may be held.
        """
        self._put({key: value})

    def update(self, *args: Any, **more: Any) -> None:
        """Put several entries in, or none of them.

        Raises:
            MemoryLimitExceededError: That would be more than may be held.
        """
        self._put(dict(*args, **more))

    def replace(self, values: Mapping[str, Any]) -> None:
        """Put these entries in the place of all that are in it; or change nothing.

        Raises:
            MemoryLimitExceededError: That would be more than may be held.
        """
        self._put(dict(values), anew=True)

    def _put(self, values: dict[str, Any], *, anew: bool = False) -> None:
        known = [self._sizes.get(key, _NOTHING) for key in values]
        before = self.held_bytes if anew else sum(size for size, _ in known)
        left = MAX_OBJECTS - (0 if anew else self._objects - sum(count for _, count in known))
        sizes: dict[str, tuple[int, int]] = {}
        for key, value in values.items():
            size, count = size_and_count(value, left)
            sizes[key] = sys.getsizeof(key) + size, count
            left -= count
        if self._budget is not None:
            self._budget.reserve(self.owner, sum(size for size, _ in sizes.values()) - before)
        with _WRITING:
            if anew:
                super().clear()
                self._record_sizes({}, gone=list(self._sizes))
            super().update(values)
            self._record_sizes(sizes)
        self._changed()

    def __ior__(self, values: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> MeteredDict:  # type: ignore[override, misc]
        self.update(values)
        return self

    def setdefault(self, key: str, default: Any = None) -> Any:
        """The value of a key; `default`, which is put in, if there is none.

        Raises:
            MemoryLimitExceededError: That would be more than may be held.
        """
        if key not in self:
            self[key] = default
        return self[key]

    # ── taking out ──

    def __delitem__(self, key: str) -> None:
        with _WRITING:
            super().__delitem__(key)
            self._record_sizes({}, gone=[key])
        self._changed()

    def pop(self, key: str, *default: Any) -> Any:
        """Take an entry out, and return its value."""
        with _WRITING:
            value = super().pop(key, *default)
            self._record_sizes({}, gone=[key])
        self._changed()
        return value

    def popitem(self) -> tuple[str, Any]:
        """Take the entry out that was put in last."""
        with _WRITING:
            key, value = super().popitem()
            self._record_sizes({}, gone=[key])
        self._changed()
        return key, value

    def clear(self) -> None:
        """Take everything out."""
        with _WRITING:
            super().clear()
            self._record_sizes({}, gone=list(self._sizes))
        self._changed()

    # ── counting ──

    def _record_sizes(self, sizes: Mapping[str, tuple[int, int]], gone: Iterable[str] = ()) -> None:
        """Note the sizes of entries that were put in, and forget those of entries that are gone."""
        for key in (*gone, *sizes):
            size, count = self._sizes.pop(key, _NOTHING)
            self.held_bytes -= size
            self._objects -= count
        for key, (size, count) in sizes.items():
            self.held_bytes += size
            self._objects += count
            self._sizes[key] = size, count

    def _changed(self) -> None:
        budget = self._budget  # it may be let go while a thread writes
        if budget is not None:
            budget.changed(self)

    def flush_accounting(self) -> int:
        """How much more it holds than is in the ledger, where it is from now on. On the event loop only."""
        held = 0 if self._budget is None else self.held_bytes
        more, self.counted_bytes = held - self.counted_bytes, held
        return more

    def remeasure(self) -> Iterator[None]:
        """Measure everything anew, a part of an entry at each step: values may have grown or shrunk inside."""
        for key, value in list(self.items()):
            known = self._sizes.get(key, _NOTHING)[1]
            size, count = yield from iter_size(value, MAX_OBJECTS - self._objects + known)
            with _WRITING:
                if self.get(key) is value:
                    self._record_sizes({key: (sys.getsizeof(key) + size, count)})
            self._changed()
            yield
        if self._budget is not None and self.owner is not None:
            self._budget.check_limit(self.owner)

    def detach(self) -> None:
        """It is kept for nobody any more, and counted no longer. Whoever still has it can use it."""
        budget, self._budget = self._budget, None
        self.owner = None
        if budget is not None:
            budget.changed(self)
