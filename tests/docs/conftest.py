"""Fixtures that the tests of the pages share."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest

from fastapi_ws_stabilizer import get_logger
from tests.docs.pages import Block


@pytest.fixture(autouse=True)
def untouched_logging() -> Iterator[None]:
    """Restore the library's logger and the root logger after the test, because pages and examples configure them."""
    loggers = (get_logger(), get_logger().root)
    before = [(logger, logger.level, list(logger.handlers), logger.propagate) for logger in loggers]
    yield
    for logger, level, handlers, propagate in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers
        logger.propagate = propagate


@pytest.fixture
def run() -> Iterator[Callable[[Block], ModuleType]]:
    """Return a function that runs a block as a module, which is removed after the test."""
    made: list[str] = []

    def execute(block: Block) -> ModuleType:
        module = ModuleType(re.sub(r"\W", "_", f"page_{block}"))
        # pydantic and typing look up a class's module by its name.
        sys.modules[module.__name__] = module
        made.append(module.__name__)
        exec(compile(block.module, str(block), "exec"), vars(module))
        return module

    yield execute
    for name in made:
        del sys.modules[name]
