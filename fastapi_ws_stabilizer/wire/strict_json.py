"""Reading the JSON that comes from the other side: all of it is read here, so that the limits hold everywhere.

The server holds what it sends to a limit too (`check_sent`), so that each client can read it.

Where JSON leaves something open, it is settled here: of two members of the same name the last one counts, as in
JavaScript, in Python's own `json`, and when pydantic validates the same text. The parser stops by itself at 200 levels
and at 4300 digits.
"""

from __future__ import annotations

import gc
import re
import sys
from typing import Any, Final

from pydantic_core import from_json

MAX_DEPTH: Final = 64
"""Levels of objects and lists inside each other in what a client sends."""

MAX_SENT_DEPTH: Final = 72
"""Levels in what a server sends. There are more of them than in what comes in: an application passes on what a client
has said inside objects of its own."""

MAX_FRAME_DEPTH: Final = MAX_SENT_DEPTH + 1
"""Levels in a frame of a server that carries such data."""

MAX_NUMBER: Final = sys.float_info.max
"""Largest number, which is the largest that a double can be: JavaScript and most others know no other kind."""

_LIST_CHARS: Final = len("[]")
_OBJECT_CHARS: Final = len('{"":}')
"""What one level takes at the least."""

_SHORT: Final = _LIST_CHARS * MAX_DEPTH
_SHORT_OF_OBJECTS: Final = _OBJECT_CHARS * MAX_DEPTH
"""A text of no more characters has no room for too many levels: of any kind, and without a list among them."""

_FEW: Final = 16
_CHARS_OF_EACH: Final = 32
"""So many values, and one more for so many characters, are looked at one by one: to search their text takes longer."""

_MAX_SAFE: Final = 2**63
"""An integer below it need not be compared with a float."""

_MIN_HUGE_DIGITS: Final = 200
"""Digits that a number above `MAX_NUMBER` has before its point, unless its exponent has three digits or more."""

_STEP: Final = 40
_DIGITS: Final = bytes.maketrans(b"123456789", b"000000000")
_exponent: Final = re.compile(r"e[+0-9][0-9]{2}(?<=[0-9]e...)[0-9]*(?:[,\]}\s]|\Z)").search
_NO_BRACKETS: Final = bytes(set(range(256)) - set(b"[]{}"))
_capital_exponent: Final = re.compile(r"E[+0-9][0-9]{2}(?<=[0-9]E...)[0-9]*(?:[,\]}\s]|\Z)").search


class InvalidJsonError(ValueError):
    """A text is no JSON, or none that is taken here. Its sentence is for whoever sent the text."""


def read_json(text: str | bytes, max_depth: int = MAX_DEPTH) -> Any:
    """The value of a JSON text.

    Args:
        text: What came in; bytes are UTF-8.
        max_depth: Levels that it may have, at least `MAX_DEPTH`.

    Raises:
        InvalidJsonError: It is no JSON, has NaN, Infinity or half of a surrogate pair in it, is nested deeper than
            `max_depth`, or has a number beyond `MAX_NUMBER`.
    """
    try:
        value = from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidJsonError(f"it is not JSON: {error}") from None
    except TypeError:  # what pydantic says of a Python string that is not Unicode
        raise InvalidJsonError("it is not JSON: there is half of a surrogate pair in it") from None
    # This runs for every message, so it does as little as can be, and errs on the side of looking.
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
    elif size > _SHORT and (size > _SHORT_OF_OBJECTS or "[" in text) and _has_many_levels(text):
        _check_depth(value, max_depth)
    return value


def check_json(text: str | bytes) -> None:
    """Raise where `read_json` would and pydantic, which is about to validate the same text, would not.

    Raises:
        InvalidJsonError: As `read_json`. What is no JSON at all may pass: pydantic says so itself.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    if (
        _exponent(text)
        or ("E" in text and _capital_exponent(text))
        or (len(text) >= _MIN_HUGE_DIGITS and _has_many_digits(text))
        or (len(text) > _SHORT and _has_many_levels(text))
        or ("N" in text and "NaN" in text)
        or ("I" in text and "Infinity" in text)
    ):
        read_json(text)


def check_sent(text: bytes, max_depth: int = MAX_SENT_DEPTH) -> None:
    """Raise if a JSON text that was made here could not be read by each client.

    Hot path: it runs once for each message that is encoded, and reads the text only where that looks suspicious.

    Raises:
        InvalidJsonError: It is nested deeper than `max_depth`, has a number beyond `MAX_NUMBER`, or a NaN or an
            infinity, which a pydantic model may write.
    """
    size = len(text)
    if (
        (size > _SHORT and (_has_many(text, b"[") or _has_many(text, b"{")) and not _is_shallow(text))
        or (size >= _MIN_HUGE_DIGITS and _has_many_digits(text))
        or (b"N" in text and b"NaN" in text)  # to look for one letter takes a tenth of the time
        or (b"I" in text and b"Infinity" in text)
    ):
        read_json(text, max_depth)


def _has_many(text: bytes, bracket: bytes) -> bool:
    """Whether there are so many brackets of a kind that there may be too many levels.

    Where there are few it is fast: `split` searches by machine words, `count` by bytes.
    """
    return len(text.split(bracket, MAX_SENT_DEPTH // 2)) > MAX_SENT_DEPTH // 2


def _is_shallow(text: bytes) -> bool:
    """Whether a text is certain to be within `MAX_SENT_DEPTH`, by its brackets alone.

    Each round takes the innermost pairs away, of two levels at most.
    """
    brackets = text.translate(None, _NO_BRACKETS)
    for _ in range(MAX_SENT_DEPTH // 2):
        fewer = brackets.replace(b"{}", b"").replace(b"[]", b"")
        if not fewer:
            return True
        if len(fewer) == len(brackets):  # there are brackets in a string
            return False
        brackets = fewer
    return False


def _is_plain(value: Any, most: int) -> bool:
    """Whether an object or a list is within the limits, as far as so many values tell."""
    if value.__class__ is not dict and value.__class__ is not list:
        return False
    containers: list[Any] = [value]
    for container in containers:
        most -= len(container)
        if most < 0 or len(containers) > MAX_DEPTH:
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
    return len(containers) <= MAX_DEPTH  # they cannot be deeper than that


def _has_many_digits(text: str | bytes) -> bool:
    """Whether a text may have too many digits in a row."""
    return _has_digits(text, _STEP) and _has_digits(text, 1)


def _has_digits(text: str | bytes, step: int) -> bool:
    """Whether there are digits in a row where it is looked at, at each step."""
    samples = text[::step]
    if isinstance(samples, str):
        samples = samples.encode("utf-8", "replace")
    return b"0" * (_MIN_HUGE_DIGITS // step) in samples.translate(_DIGITS)


def _has_many_levels(text: str) -> bool:
    """Whether a text may be nested too deep."""
    return text.count("[") + text.count("{") > MAX_DEPTH


def _check_depth(value: Any, max_depth: int) -> None:
    """Raise if a value is nested too deep.

    The garbage collector knows what holds what, and does not track a dict that holds no container, nor what is none. To
    ask it takes a part of the time in which the value was parsed; to look at each value takes twice as long as that.
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
                    raise InvalidJsonError(f"a number in it is beyond {MAX_NUMBER:.2g}")
        if not below:
            return
        level = below
    raise InvalidJsonError(f"it is nested deeper than {max_depth} levels")
