"""Measuring what user data holds."""

from __future__ import annotations

import functools
import sys
from collections import deque
from collections.abc import Generator, Iterable, Mapping
from types import BuiltinFunctionType, CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any, Final

MAX_OBJECTS: Final = 100_000
"""How many objects of one dict are measured at most; what lies beyond is not counted."""

STEP: Final = 1_000
"""Objects that are measured in one step, a millisecond or less."""

_HOLD_NOTHING: Final = (
    *(str, bytes, bytearray, int, float, complex),
    *(type, ModuleType, FunctionType, BuiltinFunctionType, MethodType, CodeType),
)
"""What is as large as it looks; and code, which belongs to no client."""

_PLAIN: Final = frozenset({str, bytes, bytearray, int, float, complex, bool, type(None)})

SHARED_PACKAGES: Final = {
    "asyncio",
    "concurrent",
    "fastapi",
    "fastapi_ws_stabilizer",
    "logging",
    "starlette",
    "threading",
    "uvloop",
}
"""Packages whose objects know the application, the event loop or the manager, and with that everybody's memory."""


def deep_size(value: Any) -> int:
    """Bytes of memory that a value holds, with what is in containers and in objects of the application; each once.

    Works without recursion, so no depth is too much for it, and looks at `MAX_OBJECTS` at most.
    """
    return size_and_count(value, MAX_OBJECTS)[0]


def size_and_count(value: Any, most: int) -> tuple[int, int]:
    """Bytes of memory that a value holds, and in how many objects; the value itself and no more than `most`."""
    steps = iter_size(value, most)
    while True:
        try:
            next(steps)
        except StopIteration as done:
            size, count = done.value
            return size, count


def iter_size(value: Any, most: int) -> Generator[None, None, tuple[int, int]]:
    """Measure in steps; return what `size_and_count` does."""
    seen: set[int] = set()
    waiting = [value]
    size = 0
    while waiting and (len(seen) < most or not seen):
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        own_size, inside = _measured(item)
        size += own_size
        waiting.extend(inside)
        if not len(seen) % STEP:
            yield
    return size, len(seen)


def _measured(item: Any) -> tuple[int, Iterable[Any]]:
    """Bytes of one object, and what it holds."""
    try:
        return sys.getsizeof(item), _inside(item)
    except Exception:  # it is the application's, and may be a proxy that stands for nothing at the moment
        return 0, ()


def _inside(item: Any) -> Iterable[Any]:
    """What an object holds."""
    kind = type(item)
    if kind in _PLAIN:  # most are, and to ask whether they are a mapping takes longer than all the rest
        return ()
    if kind is dict:
        return [*item, *item.values()]
    if isinstance(item, Mapping):
        return [*item.keys(), *item.values()]
    if isinstance(item, (list, tuple, set, frozenset, deque)):
        return item
    if isinstance(item, _HOLD_NOTHING):
        return ()
    if isinstance(item, memoryview):
        return (item.obj,)
    slots = _slots(kind)  # type: ignore[arg-type]  # a class is hashable, whatever mypy says of `type[Any]`
    if slots is None:
        return ()
    inside = [vars(item)] if hasattr(item, "__dict__") else []
    for slot in slots:
        try:
            inside.append(slot.__get__(item))
        except AttributeError:  # nothing was ever put into it
            continue
    return inside


@functools.lru_cache(maxsize=1024)
def _slots(kind: type) -> tuple[MemberDescriptorType, ...] | None:
    """The slots of the objects of a class; `None` if what they hold is not theirs."""
    if any(one.__module__.partition(".")[0] in SHARED_PACKAGES for one in kind.__mro__):
        return None
    return tuple(
        slot
        for one in kind.__mro__
        if "__slots__" in vars(one)
        for slot in vars(one).values()
        if isinstance(slot, MemberDescriptorType)
    )
