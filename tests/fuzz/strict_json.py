"""JSON as RFC 8259 has it, read by somebody else's parser."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn


def strict_json(text: str | bytes) -> Any:
    """Read JSON; `NaN` and `Infinity` are none.

    Raises:
        ValueError: It is none.
    """
    return json.loads(text, parse_constant=_refuse)


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON")


def finite(value: Any) -> Any:
    """A value as it arrives: what JSON does not have has become `null`."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: finite(one) for name, one in value.items()}
    return [finite(one) for one in value] if isinstance(value, list) else value
