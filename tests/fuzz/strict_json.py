"""JSON as in RFC 8259, read by an independent parser."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn


def strict_json(text: str | bytes) -> Any:
    """Parse JSON; reject `NaN` and `Infinity`.

    Raises:
        ValueError: It is not valid JSON.
    """
    return json.loads(text, parse_constant=_refuse)


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


def finite(value: Any) -> Any:
    """Return a value as it arrives: values that JSON does not have are `null`."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: finite(one) for name, one in value.items()}
    return [finite(one) for one in value] if isinstance(value, list) else value
