"""Tests of measuring user data."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pytest

from fastapi_ws_stabilizer.manager import WebSocketConnectionManager
from fastapi_ws_stabilizer.memory.sizing import MAX_OBJECTS, deep_size
from tests.support.fake_websocket import FakeServer


class Basket:
    """Object of an application."""

    def __init__(self, content: object) -> None:
        self.content = content


class Slotted:
    """Object without a `__dict__`."""

    __slots__ = ()


@pytest.mark.parametrize(
    "value", [None, 7, 1.5, "text", b"bytes", Slotted(), int], ids=lambda value: type(value).__name__
)
def test_simple_value_has_size_of_getsizeof(value: object) -> None:
    """A value without references has the size that `sys.getsizeof` returns."""
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
def test_nested_value_is_counted(wrap: object) -> None:
    """10 MB deep inside containers and objects count as 10 MB."""
    inner = b"x" * 10_000_000
    assert 10_000_000 < deep_size(wrap(inner)) < 10_010_000  # type: ignore[operator]


def test_shared_object_counts_once() -> None:
    """A shared object counts once."""
    inner = b"x" * 1_000_000
    assert deep_size([inner, inner, {"again": inner}]) < 1_010_000


def test_self_referencing_container_is_measured() -> None:
    """A container that contains itself is measured."""
    circle: list[object] = []
    circle.append(circle)
    assert deep_size(circle) == sys.getsizeof(circle)


def test_deep_nesting_is_measured_without_recursion() -> None:
    """Nesting beyond Python's recursion limit is measured."""
    value: list[object] = []
    for _ in range(50_000):
        value = [value]
    assert deep_size(value) > 50_000 * sys.getsizeof([])


def test_measured_objects_are_limited() -> None:
    """At most `MAX_OBJECTS` objects are measured, so that no value blocks the event loop for long."""
    many = [float(number) for number in range(2 * MAX_OBJECTS)]
    assert deep_size(many) < sys.getsizeof(many) + sys.getsizeof(1.0) * (MAX_OBJECTS + 1)


@dataclass
class Record:
    """Dataclass."""

    content: object


@dataclass(frozen=True, slots=True)
class SlottedRecord:
    """Dataclass without a `__dict__`."""

    content: object


class SlottedBasket:
    """Object with slots, one of them private and one empty."""

    __slots__ = ("__content", "empty")

    def __init__(self, content: object) -> None:
        self.__content = content


class Mixed(SlottedBasket):
    """Object with slots and a `__dict__`."""

    def __init__(self, content: object) -> None:
        super().__init__(b"")
        self.more = content


class Inheriting(SlottedBasket):
    """Object with inherited slots."""

    __slots__ = ()


@pytest.mark.parametrize(
    "wrap", [lambda inner: deque([inner]), Record, SlottedRecord, SlottedBasket, Mixed, Inheriting, memoryview]
)
def test_contents_of_deque_slots_and_views_are_counted(wrap: Callable[[Any], object]) -> None:
    """The contents of a deque, of slots, of a `__dict__`, and of the buffer of a memoryview are counted."""
    assert 10_000_000 < deep_size(wrap(b"x" * 10_000_000)) < 10_010_000


class Service:
    """Object of an application, with a method."""

    def __init__(self) -> None:
        self.content = b"x" * 1_000_000

    def serve(self) -> None:
        """Do nothing."""


async def test_shared_runtime_objects_count_without_contents() -> None:
    """Modules, functions, methods, classes, loggers, event loops and objects of the library count without contents."""
    manager = WebSocketConnectionManager()
    socket = await manager.connect("ann", await FakeServer().accepted())
    loop = asyncio.get_running_loop()
    shared: list[Any] = [sys, deep_size, len, Service().serve, Service, logging.getLogger("x"), loop, manager, socket]
    for one in (*shared, threading.Thread()):
        assert deep_size(one) == sys.getsizeof(one), one
    await socket.close()
    await manager.graceful_shutdown(1.0)


class UnboundProxy:
    """Proxy outside of its context, with attributes that raise."""

    def __getattribute__(self, name: str) -> object:
        raise RuntimeError("outside of the request")


class BrokenMapping(dict[str, object]):
    """Mapping that cannot be read."""

    def keys(self) -> Any:
        raise OSError("the database is gone")


@pytest.mark.parametrize("kind", [UnboundProxy, BrokenMapping])
def test_unmeasurable_object_raises_nothing(kind: Callable[[], object]) -> None:
    """An object that cannot be measured counts little and raises nothing, and values beside it are counted."""
    unmeasurable = kind()
    inner = b"x" * 1_000_000
    assert 1_000_000 < deep_size([unmeasurable, inner]) < 1_001_000
    assert 1_000_000 < deep_size([inner, unmeasurable]) < 1_001_000
