"""Tests of the decorators of a manager."""

from __future__ import annotations

from typing import Any

import pytest

from fastapi_ws_stabilizer.handlers.hooks import HOOK_SIGNATURES
from fastapi_ws_stabilizer.manager import WebSocketConnectionManager


def ignore(*_: Any) -> None:
    """Do nothing."""


def test_manager_has_decorator_for_each_event() -> None:
    """Each event has a decorator, which registers for that event, with and without parentheses."""
    manager = WebSocketConnectionManager()
    for event in HOOK_SIGNATURES:
        decorator = getattr(manager, f"on_{event}")
        assert decorator(ignore) is ignore
        assert decorator()(ignore) is ignore
        assert [hook.function for hook in manager._hooks._hooks[event]] == [ignore] * 2


def test_decorators_of_two_managers_are_separate() -> None:
    """A function that is registered for one manager is not called by another."""
    first, second = WebSocketConnectionManager(), WebSocketConnectionManager()
    first.on_connect(lambda ws: None)
    first.on_message("chat")(lambda ws: None)
    assert not second._hooks.has("connect")
    assert not second._handlers


@pytest.mark.parametrize("name", ["on_connect", "on_message"])
def test_decorator_of_class_raises_and_names_right_one(name: str) -> None:
    """A decorator of the class instead of a manager raises, and the error says what to write."""
    with pytest.raises(TypeError, match=f"write @manager.{name}"):
        getattr(WebSocketConnectionManager, name)(lambda ws: None)
