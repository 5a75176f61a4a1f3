"""Tests of measuring what user data holds."""

from __future__ import annotations

import sys
from types import MappingProxyType

import pytest

from fastapi_ws_stabilizer.limits.memory import MAX_OBJECTS, deep_size


class Basket:
    """An object of an application."""

    def __init__(self, content: object) -> None:
        self.content = content


class Slotted:
    """An object without a dict."""

    __slots__ = ()


@pytest.mark.parametrize("value", [None, 7, 1.5, "text", b"bytes", Slotted(), int], ids=repr)
def test_a_simple_value_is_as_big_as_python_says(value: object) -> None:
    """What holds nothing else is measured as it is."""
    assert deep_size(value) == sys.getsizeof(value)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda inner: {"key": inner},
        lambda inner: {inner: "value"},
        lambda inner: [inner],
        lambda inner: (inner,),
        lambda inner: {inner},
        lambda inner: frozenset([inner]),
        lambda inner: MappingProxyType({"key": inner}),
        lambda inner: Basket(inner),
        lambda inner: {"a": [Basket({"b": (inner,)})]},
    ],
)
def test_what_is_inside_counts(wrap: object) -> None:
    """Ten megabytes deep inside containers and objects are counted as ten megabytes."""
    inner = b"x" * 10_000_000
    assert 10_000_000 < deep_size(wrap(inner)) < 10_010_000  # type: ignore[operator]


def test_an_object_that_is_held_twice_counts_once() -> None:
    """Shared objects are measured once."""
    inner = b"x" * 1_000_000
    assert deep_size([inner, inner, {"again": inner}]) < 1_010_000


def test_a_circle_has_an_end() -> None:
    """A container that contains itself can be measured."""
    circle: list[object] = []
    circle.append(circle)
    assert deep_size(circle) == sys.getsizeof(circle)


def test_no_depth_is_too_much() -> None:
    """Nesting far beyond Python's recursion limit is measured."""
    value: list[object] = []
    for _ in range(50_000):
        value = [value]
    assert deep_size(value) > 50_000 * sys.getsizeof([])


def test_measuring_has_a_limit() -> None:
    """Beyond a number of objects the rest is not looked at, so that no value can block the event loop for long."""
    many = [float(number) for number in range(2 * MAX_OBJECTS)]
    assert deep_size(many) < sys.getsizeof(many) + sys.getsizeof(1.0) * (MAX_OBJECTS + 1)
