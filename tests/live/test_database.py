"""Clients lost during a query leak no connection of the database pool."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from websockets.asyncio.client import connect

from tests.support.server import LiveServer, until

Serve = Callable[..., LiveServer]

DROPS = 100
AT_ONCE = 10


@pytest.mark.parametrize("kind", [pytest.param("uvicorn-sansio", marks=pytest.mark.soak), "uvicorn-stable"])
@pytest.mark.parametrize("route", ["handler", pytest.param("dependency", marks=pytest.mark.soak)])
@pytest.mark.parametrize(("grace", "rows"), [(0.05, 1_000_000), (5.0, 20_000)], ids=["cancelled", "finished"])
async def test_hundred_drops_during_queries_leak_no_connection(
    serve: Serve, tmp_path: Path, kind: str, route: str, grace: float, rows: int
) -> None:
    """Each database connection returns to the pool, whether its query finishes within the grace or is cancelled."""
    config = {"disconnect_grace": grace}
    server = serve(kind, app="tests.live.database_app:app", config=config, env={"TEST_DATABASE": str(tmp_path / "db")})

    async def drop(number: int) -> None:
        client = await connect(server.url(f"/{route}/c{number}"))
        begun = server.get("/pool")["begun"]
        await client.send(f'{{"type":"ask","rows":{rows}}}')
        await until(lambda: server.get("/pool")["begun"] > begun, 20)
        client.transport.abort()

    for first in range(0, DROPS, AT_ONCE):
        await asyncio.gather(*(drop(number) for number in range(first, first + AT_ONCE)))
        await until(lambda: server.get("/pool")["unfinished"] == 0, 20)
    await until(lambda: server.get("/pool")["checked_out"] == 0, 10)
    found = server.get("/pool")
    assert (found["begun"], found["connections"]) == (DROPS, 0)
    assert found["finished"] + len(found["cancelled"]) == DROPS
    assert set(found["cancelled"]) <= {1}
    if grace < 1:
        assert len(found["cancelled"]) > DROPS / 2
    else:
        assert found["finished"] == DROPS
    assert server.errors() == []
    assert "non-checked-in" not in server.log
    server.terminate(10)
    assert "non-checked-in" not in server.log
