"""SIGTERM on servers that do not wait for a drain. docs/deploy/drain.md quotes the results."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable

import pytest

from tests.live.test_drain import APP, CONFIG, Closes, closes, connect_clients
from tests.support.server import LiveServer, until

Serve = Callable[..., LiveServer]

CLIENTS = 100

pytestmark = pytest.mark.timeout(90)


async def stop(server: LiveServer) -> Closes:
    """Send SIGTERM with clients connected, and return time, code and reason of each close."""
    clients = await connect_clients(server, CLIENTS)
    # The handshake of a client may end before the application counts it.
    await until(lambda: server.get("/ws-stats/")["connections"] == CLIENTS)
    since = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    found = await asyncio.wait_for(closes(clients, since), 30)
    await asyncio.to_thread(server.process.wait, 15)
    return found


async def test_hypercorn_without_workers_drains_over_window(serve: Serve) -> None:
    """With `--workers 0` the server runs in the process that gets the signal, and closes are spread over time."""
    found = await stop(serve("hypercorn", app=APP, config=CONFIG, args=("--workers", "0")))
    assert found.codes == {1012}
    assert {reason.split(";")[0] for reason in found.reasons} == {"server shutdown"}
    assert max(found.times) > 0.5


async def test_hypercorn_with_workers_closes_all_at_once(serve: Serve) -> None:
    """Workers get no signal of their own, so all clients are closed within 1 s, without `retry=`."""
    found = await stop(serve("hypercorn", app=APP, config=CONFIG))
    times = found.times
    assert max(times) - min(times) < 1.0
    assert not any("retry=" in reason for reason in found.reasons)


async def test_granian_closes_all_at_once(serve: Serve) -> None:
    """The worker does not wait, so all clients are closed within 1 s, with or without a close frame."""
    found = await stop(serve("granian", app=APP, config=CONFIG))
    times = found.times
    assert max(times) - min(times) < 1.0
    assert found.codes <= {1000, 1001, 1006, 1012}
