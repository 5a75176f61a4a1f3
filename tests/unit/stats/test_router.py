"""Tests of the stats router."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any

import httpx
import pytest
from fastapi import Depends, FastAPI, Header, HTTPException, WebSocketException
from starlette.testclient import TestClient, WebSocketDenialResponse

from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.dependencies import StableSocketDep
from fastapi_ws_stabilizer.errors import ConnectionLimitExceededError
from fastapi_ws_stabilizer.manager import WebSocketConnectionManager
from fastapi_ws_stabilizer.stats import stats_router
from tests.support.fake_websocket import FakeServer, eventually

SECRET = "a-secret-of-32-characters-or-more"


def make(manager: WebSocketConnectionManager, **kwargs: Any) -> FastAPI:
    """Return an app with a socket and the stats."""
    app = FastAPI(lifespan=manager.lifespan)
    app.include_router(stats_router, prefix="/ws-stats", **kwargs)

    @app.websocket("/ws/{client_id}")
    async def endpoint(ws: StableSocketDep) -> None:
        async for message in ws:
            await ws.send(message)

    return app


@pytest.fixture
def manager() -> WebSocketConnectionManager:
    """Return a manager."""
    return WebSocketConnectionManager()


@pytest.fixture
def client(manager: WebSocketConnectionManager) -> Iterator[TestClient]:
    """Return a client of an app with that manager."""
    with TestClient(make(manager)) as client:
        yield client


def test_stats_count_connections_messages_and_close_causes(client: TestClient) -> None:
    """Connections, messages, broadcasts and closes are counted."""
    with client.websocket_connect("/ws/ann") as ann, client.websocket_connect("/ws/bob"):
        ann.send_text("hi")
        assert ann.receive_text() == "hi"
        now = client.get("/ws-stats/").json()
    assert (now["connections"], now["clients"], now["connections_opened"]) == (2, 2, 2)
    assert (now["messages_received"], now["messages_sent"]) == (1, 1)
    assert now["endings"] == {}
    assert now["uptime_seconds"] > 0
    later = client.get("/ws-stats/").json()
    assert (later["connections"], later["clients"]) == (0, 0)
    assert later["endings"] == {"client_close": 2}


def test_connections_are_listed_in_pages(client: TestClient) -> None:
    """Open connections are listed oldest first, in pages, optionally for one client."""
    with client.websocket_connect("/ws/a"), client.websocket_connect("/ws/b"), client.websocket_connect("/ws/c"):
        everything = client.get("/ws-stats/connections").json()
        assert (everything["total"], everything["offset"]) == (3, 0)
        assert [one["client_id"] for one in everything["connections"]] == ["a", "b", "c"]
        page = client.get("/ws-stats/connections", params={"offset": 1, "limit": 1}).json()
        assert (page["total"], page["offset"]) == (3, 1)
        assert [one["client_id"] for one in page["connections"]] == ["b"]
        of_client = client.get("/ws-stats/connections", params={"client_id": "c"}).json()
        assert of_client["total"] == 1
        unknown = client.get("/ws-stats/connections", params={"client_id": "unknown"}).json()
        assert unknown == {"total": 0, "offset": 0, "connections": []}


@pytest.mark.parametrize("name", ["\ud800", "a\nb", "x" * 3000], ids=["surrogate", "line break", "long"])
def test_invalid_identity_is_rejected_401_and_not_listed(manager: WebSocketConnectionManager, name: str) -> None:
    """A credential with an invalid client id is rejected with 401, and does not appear in the stats."""
    app = make(manager)

    def current_user() -> str:
        return name

    @app.websocket("/mine")
    async def mine(ws: Any = Depends(manager.socket_for(current_user))) -> None:
        await ws.run()

    with TestClient(app) as client, client.websocket_connect("/ws/ann"):
        with pytest.raises(WebSocketDenialResponse) as refused, client.websocket_connect("/mine"):
            pass
        assert refused.value.status_code == 401
        answer = client.get("/ws-stats/connections")
    assert [one["client_id"] for one in answer.json()["connections"]] == ["ann"]


def test_connection_is_found_by_connection_id(client: TestClient) -> None:
    """A connection is returned with all its details by its id; another id is a 404."""
    with client.websocket_connect("/ws/ann") as ws:
        ws.send_text("pong")
        (listed,) = client.get("/ws-stats/connections").json()["connections"]
        one = client.get(f"/ws-stats/connections/{listed['connection_id']}").json()
        assert set(one) == {
            "connection_id",
            "client_id",
            "address",
            "session_id",
            "connected_seconds",
            "silent_seconds",
            "rtt_seconds",
            "queued_messages",
            "queued_bytes",
            "dropped_messages",
            "unread_messages",
            "unread_bytes",
            "held_bytes",
            "rooms",
        }
        assert (one["connection_id"], one["client_id"]) == (listed["connection_id"], "ann")
        assert one["address"] == "testclient"
        assert one["connected_seconds"] >= one["silent_seconds"] >= 0
        assert one["rtt_seconds"] is None
        assert (one["queued_messages"], one["queued_bytes"], one["unread_messages"]) == (0, 0, 0)
    missing = client.get(f"/ws-stats/connections/{listed['connection_id']}")
    assert (missing.status_code, missing.json()) == (404, {"detail": "no open connection has this id"})


@pytest.mark.parametrize("params", [{"limit": 0}, {"limit": 1001}, {"offset": -1}])
def test_invalid_page_parameters_return_422(client: TestClient, params: dict[str, int]) -> None:
    """The size of a page is limited."""
    assert client.get("/ws-stats/connections", params=params).status_code == 422


async def test_health_returns_503_after_shutdown(manager: WebSocketConnectionManager) -> None:
    """Health is 200 while the manager runs, and 503 after a shutdown."""
    async for client in _http(make(manager)):
        await manager.start()
        healthy = await client.get("/ws-stats/health")
        assert (healthy.status_code, healthy.json()) == (200, {"status": "ok", "connections": 0})
        await manager.graceful_shutdown(timeout=1)
        stopped = await client.get("/ws-stats/health")
        assert (stopped.status_code, stopped.json()) == (503, {"status": "shut_down", "connections": 0})


async def test_drain_ends_readiness_but_not_liveness(manager: WebSocketConnectionManager) -> None:
    """A draining manager is not ready, but still alive."""
    async for client in _http(make(manager)):
        await manager.start()
        assert (await client.get("/ws-stats/health/ready")).status_code == 200
        await manager.drain(timeout=1)
        assert (await client.get("/ws-stats/health/ready")).status_code == 503
        assert (await client.get("/ws-stats/health/live")).status_code == 200
        await manager.start()
        assert (await client.get("/ws-stats/health/ready")).status_code == 200


@pytest.mark.parametrize(
    ("secret", "header", "status"),
    [
        (None, "Bearer ", 403),
        (None, f"Bearer {SECRET}", 403),
        (SECRET, "", 403),
        (SECRET, SECRET, 403),
        (SECRET, "Bearer wrong", 403),
        (SECRET, f"Bearer {SECRET}", 200),
    ],
)
async def test_drain_requires_drain_secret(secret: str | None, header: str, status: int) -> None:
    """Without a `drain_secret` no request may drain, and otherwise only requests with the secret."""
    manager = WebSocketConnectionManager(WebSocketConfig(drain_secret=secret))
    async for client in _http(make(manager)):
        await manager.start()
        answer = await client.post("/ws-stats/drain", params={"timeout": 1}, headers={"authorization": header})
        assert answer.status_code == status
        assert manager.running == (status == 403)
        if status == 200:
            assert answer.json()["closed_count"] == 0
        assert SECRET not in answer.text
        assert SECRET not in repr(manager.config)
    await manager.graceful_shutdown(timeout=1)


async def test_unstarted_manager_is_healthy(manager: WebSocketConnectionManager) -> None:
    """A manager that was not started accepts connections, so its readiness is 200."""
    async for client in _http(make(manager)):
        health = await client.get("/ws-stats/health")
        assert (health.status_code, health.json()["status"]) == (200, "ok")


async def test_stats_show_queued_and_unread_messages(manager: WebSocketConnectionManager) -> None:
    """Queued and unread messages are shown, in total and for each connection."""
    server = FakeServer()
    del server.websocket.scope["client"]
    socket = await manager.connect("ann", await server.accepted())
    server.block()
    await manager.broadcast("sending")
    await server.until(lambda: len(server.offered) == 2)
    await manager.broadcast("1234")
    server.feed_text("in")
    await eventually(lambda: socket.unread_messages)
    async for client in _http(make(manager)):
        counters = (await client.get("/ws-stats/")).json()
        (one,) = (await client.get("/ws-stats/connections")).json()["connections"]
    assert (counters["queued_messages"], counters["queued_bytes"], counters["unread_messages"]) == (1, 4, 1)
    assert counters["broadcasts"] == 2
    assert (one["queued_messages"], one["queued_bytes"], one["unread_messages"]) == (1, 4, 1)
    assert one["unread_bytes"] > 0
    assert one["address"] == "unix"
    server.release()
    await manager.graceful_shutdown(timeout=1)


async def test_client_chosen_values_are_json_escaped_in_stats(manager: WebSocketConnectionManager) -> None:
    """Markup in a client id is a JSON string in the page, and the content type is JSON."""
    hostile = '</script><script>alert(1)</script>\\"\u202e\U000e0001'
    server = FakeServer()
    socket = await manager.connect(hostile, await server.accepted())
    await socket.join("<b>lobby</b>")
    async for client in _http(make(manager)):
        answer = await client.get("/ws-stats/connections", params={"client_id": hostile})
    (one,) = answer.json()["connections"]
    assert (one["client_id"], one["rooms"]) == (hostile, ["<b>lobby</b>"])
    assert answer.headers["content-type"] == "application/json"
    assert not {"\r", "\n", "\x1b"} & set(answer.text)
    await manager.graceful_shutdown(timeout=1)


def test_stats_are_protected_by_router_dependencies(manager: WebSocketConnectionManager) -> None:
    """`dependencies=[Depends(...)]` protects every path."""

    def admin(token: Annotated[str, Header()] = "") -> None:
        if token != "secret":
            raise HTTPException(401)

    with TestClient(make(manager, dependencies=[Depends(admin)])) as client:
        for path in ("/", "/connections", "/connections/x", "/metrics", "/health"):
            assert client.get(f"/ws-stats{path}").status_code == 401
        assert client.get("/ws-stats/", headers={"token": "secret"}).status_code == 200


def test_stats_paths_are_in_openapi_document(client: TestClient) -> None:
    """Each path has a model with descriptions of its fields."""
    document = client.get("/openapi.json").json()
    assert {path for path in document["paths"] if path.startswith("/ws-stats")} == {
        "/ws-stats/",
        "/ws-stats/connections",
        "/ws-stats/connections/{connection_id}",
        "/ws-stats/metrics",
        "/ws-stats/health",
        "/ws-stats/health/live",
        "/ws-stats/health/ready",
        "/ws-stats/drain",
    }
    schemas = document["components"]["schemas"]
    assert {"StatsSummary", "ConnectionPage", "ConnectionStats", "Health"} <= set(schemas)
    assert schemas["StatsSummary"]["properties"]["queued_bytes"]["description"]


def test_stats_without_manager_raise_with_hint() -> None:
    """Stats in an app without a manager raise an error with a hint."""
    app = FastAPI()
    app.include_router(stats_router)
    with pytest.raises(Exception, match="this app has no WebSocketConnectionManager"):
        TestClient(app).get("/")


async def _http(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """Return a client on this event loop, which runs no lifespan."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://testserver") as client:
        yield client


async def test_stats_show_rejections_evictions_and_memory() -> None:
    """The totals show rejections by cause, evictions and memory; a connection shows its own memory."""
    manager = WebSocketConnectionManager(
        WebSocketConfig(max_connections=2, max_total_memory=50_000, max_message_rate=1, heartbeat_type="off")
    )
    ann, bob, carl = FakeServer(), FakeServer(), FakeServer()
    (await manager.connect("ann", await ann.accepted())).user_data["text"] = "x" * 30_000
    second = await manager.connect("bob", await bob.accepted())
    with pytest.raises(ConnectionLimitExceededError):
        await manager.connect("carl", await carl.accepted())
    second.user_data["text"] = "x" * 40_000
    bob.feed_text("one", "two")
    await eventually(lambda: manager.counters.messages_refused)
    async for client in _http(make(manager)):
        counters = (await client.get("/ws-stats/")).json()
        (one,) = (await client.get("/ws-stats/connections")).json()["connections"]
    assert (counters["evictions"], counters["messages_refused"]) == (1, 1)
    assert counters["endings"] == {"memory": 1}
    assert counters["refusals"] == {"max_connections": 1}
    assert one["client_id"] == "bob"
    assert counters["total_memory"] == one["held_bytes"] > 40_000
    await manager.graceful_shutdown(timeout=1)


async def test_rejected_handshake_is_counted_by_option_or_code() -> None:
    """A rejection is counted by its option, or otherwise by the close code with the same meaning."""
    manager = WebSocketConnectionManager(WebSocketConfig(max_connections=1))
    foreign = [(b"origin", b"https://evil.example"), (b"host", b"testserver")]
    async with manager.serve(FakeServer().websocket):
        for headers in ([], [], foreign):
            with pytest.raises(WebSocketException):
                async with manager.serve(FakeServer(headers=headers).websocket):
                    raise AssertionError("it was accepted")
    async for client in _http(make(manager)):
        counters = (await client.get("/ws-stats/")).json()
    assert counters["refusals"] == {"max_connections": 2, "4403": 1}
    await manager.graceful_shutdown(timeout=1)


async def test_stats_show_forwarded_address_of_trusted_proxy_only() -> None:
    """Behind a trusted proxy the address is the forwarded one; other peers cannot set it."""
    manager = WebSocketConnectionManager(WebSocketConfig(trusted_proxies=["10.0.0.7"]))
    said = [(b"x-forwarded-for", b"198.51.100.4, 203.0.113.9")]
    await manager.connect("behind", await FakeServer(headers=said).accepted())
    await manager.connect("liar", await FakeServer(headers=said, client=("192.0.2.1", 5)).accepted())
    async for client in _http(make(manager)):
        page = (await client.get("/ws-stats/connections")).json()["connections"]
    assert [(one["client_id"], one["address"]) for one in page] == [("behind", "203.0.113.9"), ("liar", "192.0.2.1")]
    assert [socket.address for socket in manager.get_sockets()] == ["203.0.113.9", "192.0.2.1"]
    await manager.graceful_shutdown(timeout=1)
