"""Values read from bytes, so that a fuzzer that mutates bytes mutates values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Choices:
    """Reader of values from the front of some bytes. Past their end every value is zero or empty."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        """Return whether bytes are left."""
        return self._at < len(self._data)

    def take(self, count: int) -> bytes:
        """Return the next bytes, at most as many as are left."""
        taken = self._data[self._at : self._at + count]
        self._at += count
        return taken

    def rest(self) -> bytes:
        """Return all bytes that are left."""
        return self.take(len(self._data))

    def number(self, count: int = 1) -> int:
        """Return an integer of so many bytes."""
        return int.from_bytes(self.take(count), "big")

    def pick(self, values: Sequence[T]) -> T:
        """Return one of some values."""
        return values[self.number(2 if len(values) > 256 else 1) % len(values)]

    def text(self) -> str:
        """Return a text up to the next zero byte; it may contain surrogates."""
        end = self._data.find(b"\0", self._at)
        raw = self.take((len(self._data) if end < 0 else end) - self._at)
        self._at += 1
        return text_of(raw)


def text_of(raw: bytes) -> str:
    """Return a text for any bytes: UTF-8 where valid, with surrogates for the rest."""
    try:
        return raw.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return raw.decode("utf-8", "replace")
