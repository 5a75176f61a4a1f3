"""Tests of the example with a database."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient, WebSocketTestSession

from examples import databases
from tests.docs.deadline import within

pytestmark = pytest.mark.timeout(60)


def receive(client: WebSocketTestSession) -> Any:
    """Return the next message that is not a heartbeat."""
    while (message := client.receive_json()) == {"type": "ping"}:
        pass
    return message


def test_each_message_is_stored_in_its_own_transaction() -> None:
    """Data stored by a handler or a loop is there for the next client, and no session holds a database connection."""

    def play() -> None:
        with TestClient(databases.app) as client:
            with client.websocket_connect("/ws/ann") as ann:
                assert receive(ann) == {"type": "latest", "lines": []}
                ann.send_json({"type": "say", "line": "hello"})
                assert receive(ann) == {"type": "said", "author": "ann", "line": "hello"}
                with client.websocket_connect("/own-loop/bob") as bob:
                    assert receive(bob)["type"] == "latest"
                    bob.send_text("from a loop")
                    while (text := bob.receive_text()) == '{"type":"ping"}':
                        pass
                    assert text == "stored"
                    assert client.get("/lines").json() == ["hello", "from a loop"]  # bob's session is still open
            with client.websocket_connect("/ws/cem") as cem:
                lines = [{"author": "ann", "line": "hello"}, {"author": "bob", "line": "from a loop"}]
                assert receive(cem) == {"type": "latest", "lines": lines}

    within(20.0, play)


async def test_pool_connection_is_returned_between_two_messages(tmp_path: Path) -> None:
    """Between two transactions, a session of a connection takes nothing from the pool."""
    checked_out: list[int] = []
    engine = databases.create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'db'}")
    async with databases.async_sessionmaker(engine)() as database:
        for _ in range(2):
            async with database.begin():
                await database.execute(databases.text("SELECT 1"))
                checked_out.append(engine.pool.checkedout())  # type: ignore[attr-defined]
            checked_out.append(engine.pool.checkedout())  # type: ignore[attr-defined]
            await asyncio.sleep(0)
    await engine.dispose()
    assert checked_out == [1, 0, 1, 0]
