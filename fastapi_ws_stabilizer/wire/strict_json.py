"""Strict JSON parser for everything that the peer sends, with limits on depth and numbers.

The server checks its own messages against similar limits (`check_sent`), so that every client can read them.

Where JSON is ambiguous, the parser decides. Of two members with the same name the last one counts, as in JavaScript, in
Python's own `json`, and in pydantic's validation of the same text. The underlying parser itself stops at 200 levels and
at 4300 digits.
"""

from __future__ import annotations

import gc
import re
import sys
from typing import Any, Final

from pydantic_core import from_json

MAX_DEPTH: Final = 64
"""Maximum nesting depth of objects and lists in messages of a client."""

MAX_SENT_DEPTH: Final = 72
"""Maximum nesting depth in messages of a server. It is higher, because an application may pass on a client's data
inside its own objects."""

MAX_FRAME_DEPTH: Final = MAX_SENT_DEPTH + 1
"""Maximum nesting depth of a server's frame that carries such data."""

MAX_NUMBER: Final = sys.float_info.max
"""Largest number: the maximum of a double. JavaScript and most other languages support no larger number."""

_LIST_CHARS: Final = len("[]")
_OBJECT_CHARS: Final = len('{"":}')
"""Minimum number of characters of one level."""

SHORT: Final = _LIST_CHARS * MAX_DEPTH
_SHORT_OF_OBJECTS: Final = _OBJECT_CHARS * MAX_DEPTH
"""Texts with at most this many characters cannot exceed the depth: with any nesting, and with objects only."""

_FEW: Final = 16
_CHARS_OF_EACH: Final = 32
"""`_FEW` values, plus one for each `_CHARS_OF_EACH` characters, are checked one by one. Searching their text takes
longer."""

_MAX_SAFE: Final = 2**63
"""Integers with a smaller absolute value need no comparison with a float."""

_MIN_HUGE_DIGITS: Final = 200
"""Minimum number of digits before the point in a number above `MAX_NUMBER`, unless its exponent has three or more
digits."""

_STEP: Final = 40
_DIGITS: Final = bytes.maketrans(b"123456789", b"000000000")
_exponent: Final = re.compile(r"e[+0-9][0-9]{2}(?<=[0-9]e...)[0-9]*(?:[,\]}\s]|\Z)").search
_NO_BRACKETS: Final = bytes(set(range(256)) - set(b"[]{}"))
_capital_exponent: Final = re.compile(r"E[+0-9][0-9]{2}(?<=[0-9]E...)[0-9]*(?:[,\]}\s]|\Z)").search


class InvalidJsonError(ValueError):
    """A text is not valid JSON or exceeds a limit. The sender of the text can see the message."""


def read_json(text: str | bytes, max_depth: int = MAX_DEPTH) -> Any:
    """Return the value of a JSON text.

    Args:
        text: The received text; bytes are UTF-8.
        max_depth: Maximum nesting depth, at least `MAX_DEPTH`.

    Raises:
        InvalidJsonError: The text is not JSON, contains NaN, Infinity or a lone surrogate, is nested deeper than
            `max_depth`, or has a number beyond `MAX_NUMBER`.
    """
    try:
        value = from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidJsonError(f"it is not JSON: {error}") from None
    except TypeError:  # pydantic raises it for a Python string that is not valid Unicode
        raise InvalidJsonError("it is not JSON: it contains a lone surrogate") from None
    # Hot path: it runs for every message. A cheap test decides whether to check the value, and may give false alarms.
    size = len(text)
    if size > _SHORT_OF_OBJECTS and (value.__class__ is str or _is_plain(value, _FEW + size // _CHARS_OF_EACH)):
        return value
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    if (
        _exponent(text)
        or ("E" in text and _capital_exponent(text))
        or (size >= _MIN_HUGE_DIGITS and _has_many_digits(text))
    ):
        _check(value, max_depth)
    elif size > SHORT and (size > _SHORT_OF_OBJECTS or "[" in text) and _has_many_levels(text):
        _check_depth(value, max_depth)
    return value


def check_json(text: str | bytes) -> None:
    """Apply the limits of `read_json` that pydantic does not enforce.

    Raises:
        InvalidJsonError: As for `read_json`. Invalid JSON may pass, because pydantic rejects it.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    if (
        _exponent(text)
        or ("E" in text and _capital_exponent(text))
        or (len(text) >= _MIN_HUGE_DIGITS and _has_many_digits(text))
        or (len(text) > SHORT and _has_many_levels(text))
        or ("N" in text and "NaN" in text)
        or ("I" in text and "Infinity" in text)
    ):
        read_json(text)


def check_sent(text: bytes, max_depth: int = MAX_SENT_DEPTH) -> None:
    """Raise if some clients could not read a JSON text that this side has created.

    Hot path: it runs once for each encoded message, and parses the text only if it looks suspicious.

    Raises:
        InvalidJsonError: The text is nested deeper than `max_depth`, or contains a number beyond `MAX_NUMBER`, a NaN or
            an infinity. A pydantic model can write the last two.
    """
    size = len(text)
    if (
        (size > SHORT and (_has_many(text, b"[") or _has_many(text, b"{")) and not _is_shallow(text))
        or (size >= _MIN_HUGE_DIGITS and _has_many_digits(text))
        or (b"N" in text and b"NaN" in text)  # the search for one letter takes a tenth of the time
        or (b"I" in text and b"Infinity" in text)
    ):
        read_json(text, max_depth)


def _has_many(text: bytes, bracket: bytes) -> bool:
    """Return whether a text has enough brackets of one kind to exceed the maximum depth.

    It is fast if there are few brackets: `split` searches by machine words, `count` by bytes.
    """
    return len(text.split(bracket, MAX_SENT_DEPTH // 2)) > MAX_SENT_DEPTH // 2


def _is_shallow(text: bytes) -> bool:
    """Return whether the brackets alone prove that a text is within `MAX_SENT_DEPTH`.

    Each round removes the innermost pairs, which are at most two levels.
    """
    brackets = text.translate(None, _NO_BRACKETS)
    for _ in range(MAX_SENT_DEPTH // 2):
        fewer = brackets.replace(b"{}", b"").replace(b"[]", b"")
        if not fewer:
            return True
        if len(fewer) == len(brackets):  # a string contains brackets
            return False
        brackets = fewer
    return False


def _is_plain(value: Any, max_values: int) -> bool:
    """Return whether an object or a list is within the limits, judged by at most `max_values` values."""
    if value.__class__ is not dict and value.__class__ is not list:
        return False
    containers: list[Any] = [value]
    for container in containers:
        max_values -= len(container)
        if max_values < 0 or len(containers) > MAX_DEPTH:
            return False
        for one in container.values() if container.__class__ is dict else container:
            kind = one.__class__
            if kind is str:
                continue
            if kind is int:
                if not -_MAX_SAFE < one < _MAX_SAFE:
                    return False
            elif kind is dict or kind is list:
                containers.append(one)
            elif kind is float and not -MAX_NUMBER <= one <= MAX_NUMBER:
                return False
    return len(containers) <= MAX_DEPTH  # the depth is at most the number of containers


def _has_many_digits(text: str | bytes) -> bool:
    """Return whether a text may have too many consecutive digits."""
    return _has_digits(text, _STEP) and _has_digits(text, 1)


def _has_digits(text: str | bytes, step: int) -> bool:
    """Return whether a text has consecutive digits, sampled at each step."""
    samples = text[::step]
    if isinstance(samples, str):
        samples = samples.encode("utf-8", "replace")
    return b"0" * (_MIN_HUGE_DIGITS // step) in samples.translate(_DIGITS)


def _has_many_levels(text: str) -> bool:
    """Return whether a text may be nested too deep."""
    return text.count("[") + text.count("{") > MAX_DEPTH


def _check_depth(value: Any, max_depth: int) -> None:
    """Raise if a value is nested too deep.

    Only values that the garbage collector tracks are visited, for a fraction of the parse time. It tracks containers,
    except dicts that hold no container. Visiting every value takes twice the parse time.
    """
    level: list[Any] = [value]
    for _ in range(max_depth - 1):
        level = list(filter(gc.is_tracked, gc.get_referents(*level)))
        if not level:
            return
    _check(value, max_depth)


def _check(value: Any, max_depth: int) -> None:
    level: list[Any] = [[value]]
    for _ in range(max_depth + 1):
        below: list[Any] = []
        for container in level:
            for one in container.values() if container.__class__ is dict else container:
                kind = one.__class__
                if kind is dict or kind is list:
                    below.append(one)
                elif (kind is float or kind is int) and not -MAX_NUMBER <= one <= MAX_NUMBER:
                    raise InvalidJsonError(f"it contains a number beyond {MAX_NUMBER:.2g}")
        if not below:
            return
        level = below
    raise InvalidJsonError(f"it is nested deeper than {max_depth} levels")
