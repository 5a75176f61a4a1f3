"""Fixtures and markers of the live tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.server import LiveServer
from tests.support.wire_client import Witness

HERE = Path(__file__).parent


OTHERS = ("uvicorn-wsproto", "uvicorn-websockets", "hypercorn", "granian")
"""Kinds of servers that only the long tests add to the tests of every kind. They are many and differ little."""

ON_ONE_KIND = (
    "test_admission.py",
    "test_app_handlers.py",
    "test_computing.py",
    "test_disconnect.py",
    "test_drain.py",
    "test_duplicates.py",
    "test_close_frames.py",
    "test_handshakes.py",
    "test_heartbeat.py",
    "test_identity.py",
    "test_memory_limits.py",
    "test_rates.py",
    "test_rooms.py",
    "test_sessions.py",
    "test_slow_clients.py",
    "test_slow_links.py",
    "test_stopping_handshakes.py",
    "test_stubborn_endpoints.py",
    "test_unread.py",
    "test_whole_apps.py",
)
"""Files that always run on the protocol class, and with the long tests on uvicorn's own class too."""

SHARING = (
    "test_admission.py",
    "test_app_handlers.py",
    "test_chat_example.py",
    "test_duplicates.py",
    "test_close_frames.py",
    "test_first_contact.py",
    "test_hostile.py",
    "test_identity.py",
    "test_rfc6455.py",
    "test_rfc7692.py",
    "test_rooms.py",
    "test_seed_readme.py",
    "test_sessions.py",
    "test_stable_protocol.py",
    "test_stubborn_endpoints.py",
)
"""Files that tolerate delays of seconds, so their tests run beside tests that compute, and under coverage."""

MEASURING = (
    "test_gc_pacing.py",
    "test_memory.py",
    "test_memory_limits.py",
    "test_rule_breaker.py",
    "test_stopping_servers.py",
)
"""Files with measurements, which run alone. Files in neither list tolerate delays below 1 s, and run together."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder, all of which run a server."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.live)
            if item.path.name in MEASURING:
                item.add_marker(pytest.mark.alone)
            elif item.path.name not in SHARING:
                item.add_marker(pytest.mark.timed)
            parameters = getattr(item, "callspec", None)
            long_kinds = {*OTHERS, "uvicorn-sansio"} if item.path.name in ON_ONE_KIND else set(OTHERS)
            if parameters is not None and long_kinds & {
                value for value in parameters.params.values() if isinstance(value, str)
            }:
                item.add_marker(pytest.mark.soak)


@pytest.fixture
def serve() -> Iterator[Callable[..., LiveServer]]:
    """Return a function that starts a server, which is stopped after the test."""
    with ExitStack() as stack:

        def start(kind: str = "uvicorn-sansio", **options: Any) -> LiveServer:
            return stack.enter_context(LiveServer(kind, **options))

        yield start


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    """One uvicorn for all tests of a module that share it."""
    with LiveServer() as server:
        yield server


@pytest.fixture(scope="module")
def witness(server: LiveServer) -> Iterator[Witness]:
    """Well-behaved connection that lives as long as the `server` of the module."""
    witness = Witness(server)
    yield witness
    witness.close()


@pytest.fixture
def witness_is_unaffected(witness: Witness) -> Iterator[None]:
    """Check after the test that the witness still echoes and that the server has logged no error."""
    yield
    witness.check()
