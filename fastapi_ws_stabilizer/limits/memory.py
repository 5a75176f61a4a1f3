"""Measuring what user data holds."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Final

MAX_OBJECTS: Final = 100_000
"""How many objects are measured at most; what lies beyond is not counted."""


def deep_size(value: Any) -> int:
    """Bytes of memory that a value holds, with what is inside its containers and plain objects; each object once.

    Works without recursion, so no depth is too much for it, and looks at `MAX_OBJECTS` at most.
    """
    seen: set[int] = set()
    waiting = [value]
    size = 0
    while waiting and len(seen) < MAX_OBJECTS:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        size += sys.getsizeof(item)
        if isinstance(item, Mapping):
            waiting.extend(item.keys())
            waiting.extend(item.values())
        elif isinstance(item, (list, tuple, set, frozenset)):
            waiting.extend(item)
        elif not isinstance(item, (str, bytes, bytearray, int, float, complex, type)) and hasattr(item, "__dict__"):
            waiting.append(vars(item))
    return size
