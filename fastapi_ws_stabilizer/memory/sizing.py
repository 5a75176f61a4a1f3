"""Measurement of the memory that user data holds."""

from __future__ import annotations

import functools
import sys
from collections import deque
from collections.abc import Generator, Iterable, Mapping
from types import BuiltinFunctionType, CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any, Final

MAX_OBJECTS: Final = 100_000
"""Objects of one dict that are measured. Objects above this number are not counted."""

STEP: Final = 1_000
"""Objects that are measured in one step, which takes at most about a millisecond."""

_LEAVES: Final = (
    *(str, bytes, bytearray, int, float, complex),
    *(type, ModuleType, FunctionType, BuiltinFunctionType, MethodType, CodeType),
)
"""Types that contain no other objects, and code, which belongs to no client."""

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
"""Packages with objects that refer to the application, the event loop or the manager, and so to the memory of all
clients."""


def deep_size(value: Any) -> int:
    """Return the bytes that a value holds, with containers and application objects.

    Each object counts once. It uses no recursion, so it handles any depth, and measures at most `MAX_OBJECTS` objects.
    """
    return size_and_count(value, MAX_OBJECTS)[0]


def size_and_count(value: Any, max_objects: int) -> tuple[int, int]:
    """Return the bytes that a value holds and the number of measured objects.

    It measures the value itself, and no more than `max_objects` objects.
    """
    steps = iter_size(value, max_objects)
    while True:
        try:
            next(steps)
        except StopIteration as done:
            size, count = done.value
            return size, count


def iter_size(value: Any, max_objects: int) -> Generator[None, None, tuple[int, int]]:
    """Measure in steps; return what `size_and_count` returns."""
    seen: set[int] = set()
    pending = [value]
    size = 0
    while pending and (len(seen) < max_objects or not seen):
        item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        own_size, inside = _measured(item)
        size += own_size
        pending.extend(inside)
        if not len(seen) % STEP:
            yield
    return size, len(seen)


def _measured(item: Any) -> tuple[int, Iterable[Any]]:
    """Return the bytes of one object, and the objects that it contains."""
    try:
        return sys.getsizeof(item), _inside(item)
    except Exception:  # an application object, perhaps a proxy without a target at the moment
        return 0, ()


def _inside(item: Any) -> Iterable[Any]:
    """Return the objects that an object contains."""
    kind = type(item)
    if kind in _PLAIN:  # most values are plain, and `isinstance(item, Mapping)` is slower than all the rest
        return ()
    if kind is dict:
        return [*item, *item.values()]
    if isinstance(item, Mapping):
        return [*item.keys(), *item.values()]
    if isinstance(item, (list, tuple, set, frozenset, deque)):
        return item
    if isinstance(item, _LEAVES):
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
        except AttributeError:  # the slot was never set
            continue
    return inside


@functools.lru_cache(maxsize=1024)
def _slots(kind: type) -> tuple[MemberDescriptorType, ...] | None:
    """Return the slots of a class; `None` if their contents belong to a shared package."""
    if any(one.__module__.partition(".")[0] in SHARED_PACKAGES for one in kind.__mro__):
        return None
    return tuple(
        slot
        for one in kind.__mro__
        if "__slots__" in vars(one)
        for slot in vars(one).values()
        if isinstance(slot, MemberDescriptorType)
    )
