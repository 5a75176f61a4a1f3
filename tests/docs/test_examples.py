"""Tests of the short examples: each does what its page says. The chat has its own test among the live tests."""

from __future__ import annotations

import asyncio
import importlib
import json
from types import ModuleType
from typing import Any

import pytest
from fastapi.routing import APIWebSocketRoute
from starlette.testclient import TestClient, WebSocketTestSession
from starlette.websockets import WebSocketDisconnect
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from examples.authenticated import app as authenticated
from examples.by_hand import app as by_hand
from examples.by_hand import manager as manager_by_hand
from examples.from_thread import app as from_thread
from examples.push import app as push
from examples.quickstart import app as quickstart
from examples.quickstart import manager as quickstart_manager
from examples.rooms import app as rooms
from examples.shared_login import app as shared_login
from examples.typed_messages import app as typed_messages
from examples.typed_messages import manager as typed_manager
from fastapi_ws_stabilizer import RequestError
from fastapi_ws_stabilizer.client import connect as connect_client
from tests.docs.pages import ROOT, blocks, name_of
from tests.support.server import SERVERS, LiveServer

pytestmark = pytest.mark.timeout(60)

NAMES = sorted(path.stem for path in (ROOT / "examples").glob("*.py") if path.stem != "__init__")


def heard(client: WebSocketTestSession) -> Any:
    """Return the next message of a client that is not a heartbeat; the first heartbeat comes at a random moment."""
    while (message := client.receive_json()) == {"type": "ping"}:
        pass
    return message


@pytest.mark.parametrize("name", NAMES)
def test_every_example_is_app_with_websocket_route(name: str) -> None:
    """An example imports without a server, and has an app, a manager and a WebSocket route."""
    module: ModuleType = importlib.import_module(f"examples.{name}")
    assert any(isinstance(route, APIWebSocketRoute) for route in module.app.routes)
    assert module.manager.get_connection_count() == 0


def test_quick_start_broadcasts_joins_messages_and_leaves() -> None:
    """All clients receive joins, messages and reasons for leaving; a bad message gets an error reply."""
    with TestClient(quickstart) as client, client.websocket_connect("/ws/ann") as ann:
        assert heard(ann) == {"type": "joined", "who": "ann"}
        with client.websocket_connect("/ws/bob") as bob:
            assert heard(ann) == heard(bob) == {"type": "joined", "who": "bob"}
            bob.send_json({"type": "say", "text": "hello"})
            assert heard(ann) == heard(bob) == {"type": "said", "who": "bob", "text": "hello"}
            bob.send_json({"type": "say"})
            reply = heard(bob)
            assert reply == {"type": "error", "code": "invalid_message", "message": "text: Field required"}
        assert heard(ann) == {"type": "left", "who": "bob", "why": "client_close"}
        assert quickstart_manager.get_active_connections() == ["ann"]


def test_tutorial_keeps_both_connections_of_a_client() -> None:
    """The final state of the tutorial broadcasts to two tabs of one client id, and its stats require the key."""
    app = importlib.import_module("examples.tutorial").app
    with TestClient(app) as client, client.websocket_connect("/ws/ann") as first:
        assert heard(first) == {"type": "joined", "who": "ann"}
        with client.websocket_connect("/ws/ann") as second:
            assert heard(first) == heard(second) == {"type": "joined", "who": "ann"}
            second.send_json({"type": "say", "text": "hello"})
            assert heard(first) == heard(second) == {"type": "said", "who": "ann", "text": "hello"}
            assert client.get("/ws-stats/").status_code == 403
            assert client.get("/ws-stats/", headers={"x-stats-key": "let me see"}).json()["connections"] == 2
        assert heard(first) == {"type": "left", "who": "ann", "why": "client_close"}


def test_tutorial_steps_build_its_example() -> None:
    """Each code block of step 3 and later is part of the example, so no step starts from scratch."""
    steps = [block for block in blocks("python") if name_of(block.page) == "docs/tutorial/first-socket.md"][1:]
    example = (ROOT / "examples/tutorial.py").read_text()
    replaced = {"manager = WebSocketConnectionManager()"}  # from the diff of step 5
    imports = ("from ", "import ")  # merged in the example
    lines = [line for block in steps for line in block.code.splitlines()]
    parts = [line for line in lines if line not in replaced and not line.startswith(imports)]
    assert len(steps) == 4
    assert [line for line in parts if line not in example.splitlines()] == []
    assert steps[-1].source == "examples/tutorial.py"


def test_manual_loop_broadcasts_to_others_and_hides_pongs() -> None:
    """A manual receive loop broadcasts to all clients but the sender, and never sees a pong."""
    with TestClient(by_hand) as client:
        with client.websocket_connect("/ws/ann?plan=gold") as ann, client.websocket_connect("/ws/bob") as bob:
            ann.send_text("ping")
            assert ann.receive_text() == "pong"
            ann.send_text("pong")
            ann.send_text("hello")
            assert heard(bob) == {"user": "ann", "message": "hello"}
            (socket,) = manager_by_hand.get_sockets("ann")
            assert socket.metadata == {"plan": "gold"}
        assert manager_by_hand.get_connection_count() == 0


@pytest.mark.parametrize(
    ("url", "headers"),
    [("/ws?token=secret-of-ann", {}), ("/ws", {"authorization": "Bearer secret-of-ann"})],
)
def test_logged_in_client_has_id_and_identity(url: str, headers: dict[str, str]) -> None:
    """The client id and the identity come from the login, sent in a header or in the query."""
    with TestClient(authenticated) as client, client.websocket_connect(url, headers=headers) as ws:
        assert heard(ws) == {"hello": "Ann", "client_id": "1"}


@pytest.mark.parametrize(
    "headers",
    [{"authorization": "Bearer secret-of-ann"}, {"cookie": "session=session-of-ann"}],
    ids=["header", "cookie"],
)
def test_one_dependency_authenticates_http_and_sockets(headers: dict[str, str]) -> None:
    """A credential that allows an HTTP route opens a socket too."""
    with TestClient(shared_login) as client:
        assert client.get("/me", headers=headers).json() == {"user": "ann"}
        with client.websocket_connect("/ws", headers=headers) as ws:
            assert heard(ws) == {"user": "ann"}


def test_browser_credential_travels_in_subprotocol() -> None:
    """A browser cannot set headers, so it sends its credential as a subprotocol."""
    with TestClient(shared_login) as client:
        with client.websocket_connect("/ws", subprotocols=["bearer", "secret-of-ann"]) as ws:
            assert heard(ws) == {"user": "ann"}
            assert ws.accepted_subprotocol == "bearer"


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer wrong"}], ids=["none", "wrong"])
def test_missing_credential_gets_401_on_http_route(headers: dict[str, str]) -> None:
    """An HTTP route answers 401 and names the authentication scheme."""
    with TestClient(shared_login) as client:
        answer = client.get("/me", headers=headers)
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")


def test_ticker_pushes_and_http_route_reaches_client() -> None:
    """Ticks are sent beside an echo; an HTTP route reaches a client, or reports that it is not connected."""
    with TestClient(push) as client:
        with client.websocket_connect("/clock/ann") as ann:
            assert heard(ann)["type"] == "tick"
            assert client.post("/notify/ann", json={"n": 1}).json() == {"queued": True}
            assert client.post("/announce", json={"n": 2}).json() == {"queued": 1, "failed": 0}
            ticks = [message for message in (heard(ann) for _ in range(2)) if "n" in message]
            assert ticks == [{"n": 1}, {"n": 2}]
        with client.websocket_connect("/both/bob") as bob:
            bob.send_text("hello")
            assert {heard(bob)["type"] for _ in range(2)} == {"tick", "echo"}
        assert client.post("/notify/unknown", json={}).status_code == 404


def test_other_threads_broadcast_and_disconnect() -> None:
    """A separate thread and `def` routes broadcast, disconnect, and learn that a client is not connected."""
    with TestClient(from_thread) as client:
        with client.websocket_connect("/ws/ann") as ann:
            assert heard(ann) == {"type": "temperature", "celsius": 21.5}
            assert client.post("/announce?text=hello").json() == {"queued": 1}
            said = [message for message in (heard(ann) for _ in range(2)) if "text" in message]
            assert said == [{"type": "announcement", "text": "hello"}]
            assert client.post("/kick/ann").status_code == 200
            with pytest.raises(WebSocketDisconnect) as closed:
                while True:
                    heard(ann)
            assert (closed.value.code, closed.value.reason) == (4403, "kicked")
        assert client.post("/kick/ann").status_code == 404


def test_chat_room_announces_members_and_rejects_strangers() -> None:
    """A member that joins gets the list of members, and the others an event; only members can send to the room."""
    with TestClient(rooms) as client:
        assert client.get("/rooms/lobby").status_code == 404
        with client.websocket_connect("/ws/ann") as ann:
            ann.send_json({"type": "join", "room": "lobby", "name": "Ann"})
            assert heard(ann) == {"type": "presence", "room": "lobby", "clients": [{"id": "ann", "name": "Ann"}]}
            with client.websocket_connect("/ws/bob") as bob:
                bob.send_json({"type": "say", "room": "lobby", "text": "hello"})
                assert heard(bob) == {"type": "rejected", "room": "lobby"}
                bob.send_json({"type": "join", "room": "lobby", "name": "Bob"})
                assert [one["id"] for one in heard(bob)["clients"]] == ["ann", "bob"]
                assert heard(ann) == {"type": "joined", "room": "lobby", "who": "bob"}
                bob.send_json({"type": "say", "room": "lobby", "text": "hello"})
                assert heard(ann) == {"type": "said", "who": "bob", "text": "hello"}
                assert client.get("/rooms/lobby").json() == {"clients": ["ann", "bob"]}
                bob.send_json({"type": "leave", "room": "lobby"})
                assert heard(ann) == {"type": "left", "room": "lobby", "who": "bob"}
                assert client.get("/rooms/lobby").json() == {"clients": ["ann"]}


def test_each_message_reaches_its_handler() -> None:
    """A typed handler, one without content, one in the thread pool, and a fallback handler get their messages."""
    with TestClient(typed_messages) as client, client.websocket_connect("/ws/ann") as ws:
        ws.send_json({"type": "move", "x": 1, "y": 2})
        assert heard(ws) == {"type": "moved", "who": "ann", "x": 1, "y": 2}
        ws.send_json({"type": "move", "x": 8, "y": 2})
        assert heard(ws) == {
            "type": "error",
            "code": "invalid_message",
            "message": "x: Input should be less than or equal to 7",
        }
        ws.send_json({"type": "report", "text": "all well"})
        ws.send_text("anything")
        assert heard(ws) == {"type": "echo", "text": "anything"}
        (socket,) = typed_manager.get_sockets("ann")
        assert socket.user_data == {"last_report": "all well"}
        ws.send_json({"type": "resign"})
        with pytest.raises(WebSocketDisconnect) as closed:
            heard(ws)
        assert (closed.value.code, closed.value.reason) == (4001, "resigned")


def test_stats_require_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the key, or on a server that has none configured, every path of the stats is rejected."""
    watched: Any = importlib.import_module("examples.watched")
    paths = ("/ws-stats/", "/ws-stats/connections", "/ws-stats/connections/x", "/ws-stats/health")
    with TestClient(watched.app) as client, client.websocket_connect("/ws/ann") as ann:
        ann.send_text("hello")
        assert ann.receive_text() == "hello"
        assert {client.get(path).status_code for path in paths} == {403}
        assert client.get("/ws-stats/", headers={"x-stats-key": ""}).status_code == 403
        monkeypatch.setenv("STATS_KEY", "secret")
        assert client.get("/ws-stats/", headers={"x-stats-key": "guess"}).status_code == 403
        assert client.get("/ws-stats/", headers={"x-stats-key": "secret"}).json()["connections"] == 1


@pytest.mark.live
@pytest.mark.parametrize("kind", ["uvicorn-sansio", "uvicorn-stable"])
async def test_dashboard_receives_messages_of_outage(kind: str) -> None:
    """Orders are answered or rejected, and messages sent during an outage arrive after the reconnect."""
    with LiveServer(kind, app="examples.resumable:app") as server:
        async with connect_client(server.url("/ws/ann"), base_delay=0.05, min_delay=0.01) as ann:

            @ann.on("confirm")
            async def confirm(question: str) -> bool:
                return question == "Really?"

            assert await ann.request("order", {"article": "pears", "count": 3}) == {"total": 12}
            with pytest.raises(RequestError, match="no_such_article: plums"):
                await ann.request("order", {"article": "plums", "count": 1})
            assert (await anext(ann)).data == {"type": "ordered", "article": "pears"}
            assert await asyncio.to_thread(server.post, "/confirm/ann?question=Really%3F")
            ann.reconnect()
            assert await asyncio.to_thread(server.post, "/announce?text=hello") == 1
            assert (await asyncio.wait_for(anext(ann), 5)).data == {"type": "announcement", "text": "hello"}
            async with connect_client(server.url("/ws/bob")) as bob:  # a new member gets the earlier messages
                said = [(await asyncio.wait_for(anext(bob), 5)).data["type"] for _ in range(2)]
                assert said == ["ordered", "announcement"]


@pytest.mark.live
@pytest.mark.parametrize("kind", SERVERS)
async def test_identity_rejection_is_http_status(kind: str) -> None:
    """An HTTPException of the identity dependency is the HTTP status of the handshake on every server."""
    with LiveServer(kind, app="examples.authenticated:app") as server:
        with pytest.raises(InvalidStatus) as caught:
            async with connect(server.url("/ws")):
                pass
        assert caught.value.response.status_code == 401
        async with connect(server.url("/ws?token=secret-of-ann")) as ws:
            assert json.loads(await asyncio.wait_for(ws.recv(), 5)) == {"hello": "Ann", "client_id": "1"}


@pytest.mark.live
@pytest.mark.parametrize("kind", SERVERS)
async def test_socket_without_credential_gets_401(kind: str) -> None:
    """Without a credential, or with a wrong one, the handshake gets the same 401 as an HTTP route."""
    with LiveServer(kind, app="examples.shared_login:app") as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            with pytest.raises(InvalidStatus) as caught:
                async with connect(server.url("/ws"), additional_headers=headers):
                    pass
            assert caught.value.response.status_code == 401
        async with connect(server.url("/ws"), additional_headers={"Cookie": "session=session-of-ann"}) as ws:
            assert json.loads(await asyncio.wait_for(ws.recv(), 5)) == {"user": "ann"}


@pytest.mark.live
@pytest.mark.parametrize("kind", SERVERS)
async def test_browser_rejection_has_close_code_and_reason(kind: str) -> None:
    """A foreign origin gets HTTP 403; without a login an own page gets 4401 and a reason, other clients HTTP 401."""
    origin: Any = "https://example.com"
    with LiveServer(kind, app="examples.readable_rejection:app") as server:
        for other, status in ((None, 401), ("https://elsewhere.example", 403)):
            with pytest.raises(InvalidStatus) as caught:
                async with connect(server.url("/ws"), origin=other):  # type: ignore[arg-type]
                    pass
            assert caught.value.response.status_code == status
        async with connect(server.url("/ws"), origin=origin) as stranger:
            with pytest.raises(ConnectionClosed) as closed:
                await asyncio.wait_for(stranger.recv(), 5)
        assert closed.value.rcvd is not None
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4401, "log in first")
        cookie = {"Cookie": "session=session-of-ann"}
        async with connect(server.url("/ws"), origin=origin, additional_headers=cookie) as ann:
            assert await asyncio.wait_for(ann.recv(), 5) == "hello ann"
