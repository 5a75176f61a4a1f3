"""Tests of the page about several workers. Each manager stands for one process."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi import Depends, FastAPI
from starlette.testclient import TestClient, WebSocketTestSession
from starlette.websockets import WebSocketDisconnect

from fastapi_ws_stabilizer import (
    ResumeOutcome,
    StableSocket,
    StableSocketDep,
    WebSocketConfig,
    WebSocketConnectionManager,
)
from tests.docs.deadline import within

SECRET = "the-same-secret-in-every-process"


class Process:
    """An app with its own manager, as in each worker process.

    Args:
        secret: The `reconnect_secret`; the manager generates one when left out.
    """

    def __init__(self, secret: str | None = SECRET) -> None:
        options: dict[str, Any] = {} if secret is None else {"reconnect_secret": secret}
        manager = self.manager = WebSocketConnectionManager(WebSocketConfig(heartbeat_type="off", **options))
        self.app = FastAPI(lifespan=manager.lifespan)
        self.seen: list[str] = []

        @manager.on_connect
        async def connected(ws: StableSocket) -> None:
            self.seen.append("connect")
            ws.user_data["clicks"] = 1
            await ws.join("room")
            await ws.send(ws.reconnect_token())

        @manager.on_resume
        async def resumed(ws: StableSocket, outcome: ResumeOutcome) -> None:
            self.seen.append(f"resume {outcome.value}")
            await ws.send(dict(ws.user_data))

        @self.app.websocket("/ws/{client_id}")
        async def endpoint(ws: StableSocketDep) -> None:
            await ws.run()

        @self.app.websocket("/ticket")
        async def with_ticket(ws: StableSocket = Depends(manager.socket_for(manager.ticket))) -> None:
            await ws.run()

        @self.app.post("/broadcast")
        async def broadcast() -> list[int]:
            result = await manager.broadcast("hello", room="room")
            return [result.total, int(await manager.send_to_client("ann", "hello"))]

        @self.app.post("/revoke")
        async def revoke() -> int:
            return await manager.revoke("ann")


def leave(ws: WebSocketTestSession) -> None:
    """Close the connection as a closed page does."""
    ws.close(1001)


def accepts_ticket(client: TestClient, ticket: str) -> bool:
    """Return whether a process accepts a ticket."""
    try:
        with client.websocket_connect(f"/ticket?ticket={ticket}") as ws:
            return bool(ws.receive_text())
    except Exception:  # which one is raised depends on the version of Starlette
        return False


def test_rooms_and_sends_reach_one_process() -> None:
    """A broadcast and a direct send reach only the clients of their own process."""

    def play() -> None:
        here, there = Process(), Process()
        with TestClient(here.app) as first, TestClient(there.app) as second, first.websocket_connect("/ws/ann") as ann:
            ann.receive_text()
            assert second.post("/broadcast").json() == [0, 0]
            assert first.post("/broadcast").json() == [1, 1]
            assert there.manager.get_connection_count() == 0

    within(10.0, play)


def test_same_client_id_replaces_within_one_process() -> None:
    """The same client id may be connected to each process at the same time, and limits count for each process."""

    def play() -> None:
        here, there = Process(), Process()
        with TestClient(here.app) as first, TestClient(there.app) as second, first.websocket_connect("/ws/ann") as ann:
            ann.receive_text()
            with second.websocket_connect("/ws/ann") as other:
                other.receive_text()
                assert (here.manager.get_connection_count(), there.manager.get_connection_count()) == (1, 1)
            with first.websocket_connect("/ws/ann") as newer:
                newer.receive_text()
                with pytest.raises(WebSocketDisconnect) as closed:
                    ann.receive_text()
                assert closed.value.code == 4409

    within(10.0, play)


@pytest.mark.parametrize("secret", [SECRET, None], ids=["shared", "own"])
def test_reconnect_token_restores_state_in_its_own_process_only(secret: str | None) -> None:
    """Another process treats the client as new, even with a shared secret; its own process restores its state."""

    def play() -> None:
        here, there = Process(secret), Process(secret)
        with TestClient(here.app) as first, TestClient(there.app) as second:
            with first.websocket_connect("/ws/ann") as ann:
                token = ann.receive_text()
                leave(ann)
            with second.websocket_connect(f"/ws/ann?reconnect_token={token}") as ann:
                ann.receive_text()
            assert there.seen == ["connect"]
            with first.websocket_connect(f"/ws/ann?reconnect_token={token}") as ann:
                assert ann.receive_json() == {"clicks": 1}
            assert here.seen == ["connect", "resume gap"]

    within(10.0, play)


def test_ticket_is_single_use_in_each_process() -> None:
    """With a shared secret each process accepts a ticket once; with separate secrets only the issuing process does."""

    def play() -> None:
        here, there, own = Process(), Process(), Process(None)
        with TestClient(here.app) as first, TestClient(there.app) as second, TestClient(own.app) as third:
            ticket = here.manager.issue_ticket("ann")
            assert not accepts_ticket(third, ticket)
            assert accepts_ticket(first, ticket)
            assert not accepts_ticket(first, ticket)
            assert accepts_ticket(second, ticket)

    within(10.0, play)


def test_revocation_holds_in_one_process() -> None:
    """A process in which a client was not revoked keeps its connection and accepts its tickets."""

    def play() -> None:
        here, there = Process(), Process()
        with TestClient(here.app) as first, TestClient(there.app) as second, second.websocket_connect("/ws/ann") as ann:
            ann.receive_text()
            ticket = here.manager.issue_ticket("ann")
            assert first.post("/revoke").json() == 0
            assert not accepts_ticket(first, ticket)
            assert accepts_ticket(second, ticket)

    within(10.0, play)


def test_doctor_reports_workers_without_a_secret() -> None:
    """D22 is reported where the number of workers is known and no secret is shared."""
    options = {"workers": 4}
    found = WebSocketConnectionManager().check(server="uvicorn", server_options=options)
    assert "D22" in [finding.code for finding in found]
    manager = WebSocketConnectionManager(WebSocketConfig(reconnect_secret=SECRET))
    assert "D22" not in [finding.code for finding in manager.check(server="uvicorn", server_options=options)]
