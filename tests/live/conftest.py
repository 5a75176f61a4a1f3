"""Fixtures of the live tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.live.server import LiveServer

HERE = Path(__file__).parent


OTHERS = ("uvicorn-wsproto", "uvicorn-websockets", "hypercorn", "granian")
"""Kinds of servers on which tests that run on every kind run with the long ones: they are many, and differ little."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test below this folder runs a server."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.live)
            parameters = getattr(item, "callspec", None)
            if parameters is not None and parameters.params.get("kind") in OTHERS:
                item.add_marker(pytest.mark.soak)


@pytest.fixture
def serve() -> Iterator[Callable[..., LiveServer]]:
    """Starts servers that are stopped after the test."""
    with ExitStack() as stack:

        def start(kind: str = "uvicorn-sansio", **options: Any) -> LiveServer:
            return stack.enter_context(LiveServer(kind, **options))

        yield start


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    """One uvicorn for all tests of a module that can share it."""
    with LiveServer() as server:
        yield server
