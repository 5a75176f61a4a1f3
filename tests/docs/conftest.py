"""What the tests of the pages share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastapi_ws_stabilizer import get_logger


@pytest.fixture(autouse=True)
def untouched_logging() -> Iterator[None]:
    """Give the library's logger and the root logger back as they were: pages and examples configure them."""
    loggers = (get_logger(), get_logger().root)
    before = [(logger, logger.level, list(logger.handlers), logger.propagate) for logger in loggers]
    yield
    for logger, level, handlers, propagate in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers
        logger.propagate = propagate
