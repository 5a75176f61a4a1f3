"""The stats router: totals, connections and health as JSON, and all numbers for Prometheus.

Whoever can read it sees client ids. Protect it by FastAPI's own means:
`app.include_router(stats_router, prefix="/ws-stats", dependencies=[Depends(admin)])`.
"""

from __future__ import annotations

import secrets
from typing import Annotated

from fastapi import APIRouter, Depends, Header, HTTPException, Query, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, Field

from fastapi_ws_stabilizer.connection.socket import StableSocket
from fastapi_ws_stabilizer.dependencies import find_manager
from fastapi_ws_stabilizer.manager import WebSocketConnectionManager
from fastapi_ws_stabilizer.metrics.exposition import CONTENT_TYPE, exposition
from fastapi_ws_stabilizer.shutdown.closing import ShutdownReport
from fastapi_ws_stabilizer.stats.metrics import metrics_of
from fastapi_ws_stabilizer.stats.overview import StatsSummary, overview_of


class ConnectionStats(BaseModel):
    """One open connection."""

    connection_id: str
    client_id: str
    session_id: str | None = Field(description="Its session; null for a plain client.")
    address: str = Field(description="Address of the client; behind `trusted_proxies` the one that they say.")
    connected_seconds: float
    silent_seconds: float = Field(description="Seconds since the last frame from the client.")
    rtt_seconds: float | None = Field(description="Last measured round trip; null before the first answered ping.")
    queued_messages: int
    queued_bytes: int
    dropped_messages: int = Field(description="Messages that were thrown away because the client is slow.")
    unread_messages: int
    unread_bytes: int
    held_bytes: int = Field(description="Bytes of memory that are held for it, or for its session.")
    rooms: list[str]


class ConnectionPage(BaseModel):
    """Some of the open connections, oldest first."""

    total: int
    offset: int
    connections: list[ConnectionStats]


class Health(BaseModel):
    """Whether the manager takes connections."""

    status: str = Field(description="`ok`, or `shut_down`.")
    connections: int


def _manager(request: Request) -> WebSocketConnectionManager:
    return find_manager(request)


Manager = Annotated[WebSocketConnectionManager, Depends(_manager)]

stats_router = APIRouter(tags=["websocket stats"])


@stats_router.get("/", summary="Totals")
async def overview(manager: Manager) -> StatsSummary:
    """What the manager holds now and has counted since it was made."""
    return overview_of(manager)


@stats_router.get("/connections", summary="Open connections")
async def connections(
    manager: Manager,
    client_id: Annotated[str | None, Query(description="Only those of this client.")] = None,
    offset: Annotated[int, Query(ge=0)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> ConnectionPage:
    """The open connections, oldest first, a page at a time."""
    sockets = manager.get_sockets(client_id)
    page = [_connection_stats(socket) for socket in sockets[offset : offset + limit]]
    return ConnectionPage(total=len(sockets), offset=offset, connections=page)


@stats_router.get("/connections/{connection_id}", summary="One connection")
async def connection(manager: Manager, connection_id: str) -> ConnectionStats:
    """One open connection; 404 if there is none with that id."""
    socket = manager.get_socket(connection_id)
    if socket is None:
        raise HTTPException(404, "no open connection has this id")
    return _connection_stats(socket)


@stats_router.get(
    "/metrics",
    summary="Metrics",
    response_class=PlainTextResponse,
    responses={404: {"description": "`enable_metrics` is off."}},
)
async def metrics(manager: Manager) -> PlainTextResponse:
    """All numbers in the text format 0.0.4 of Prometheus; 404 without `enable_metrics`."""
    timings = manager.events.timings
    if timings is None:
        raise HTTPException(404, "metrics are not collected: WebSocketConfig(enable_metrics=True) turns them on")
    return PlainTextResponse(exposition(metrics_of(manager, timings)), media_type=CONTENT_TYPE)


@stats_router.get("/health", summary="Health", responses={503: {"model": Health}})
async def health(manager: Manager, response: Response) -> Health:
    """Whether connections are taken: 200, or 503 after a shutdown."""
    if not manager.running:
        response.status_code = 503
    return Health(status="ok" if manager.running else "shut_down", connections=manager.get_connection_count())


@stats_router.get("/health/live", summary="Liveness")
async def live() -> dict[str, str]:
    """Whether the process answers: always, if it does."""
    return {"status": "ok"}


@stats_router.get("/health/ready", summary="Readiness", responses={503: {"model": Health}})
async def ready(manager: Manager, response: Response) -> Health:
    """Whether connections are taken: 200, or 503 from the beginning of a drain on."""
    return await health(manager, response)


@stats_router.post("/drain", summary="Drain", responses={403: {"description": "No `drain_secret`, or another one."}})
async def drain(
    manager: Manager,
    authorization: Annotated[str, Header(description="`Bearer` and the `drain_secret`.")] = "",
    timeout: Annotated[float, Query(gt=0, le=3600, description="Seconds that it may take.")] = 30.0,
) -> ShutdownReport:
    """Take no new connections, and let those that are open come back elsewhere, a few at a time; for `preStop`."""
    secret = manager.config.drain_secret
    if secret is None:
        raise HTTPException(403, "set drain_secret to allow this")
    if not secrets.compare_digest(authorization.encode(), f"Bearer {secret.get_secret_value()}".encode()):
        raise HTTPException(403)
    return await manager.drain(timeout)


def _connection_stats(socket: StableSocket) -> ConnectionStats:
    return ConnectionStats(
        connection_id=socket.connection_id,
        client_id=socket.client_id,
        session_id=socket.session_id,
        address=socket.address,
        connected_seconds=socket.connected_seconds,
        silent_seconds=socket.silent_seconds,
        rtt_seconds=socket.rtt,
        queued_messages=socket.queued_messages,
        queued_bytes=socket.queued_bytes,
        dropped_messages=socket.dropped_messages,
        unread_messages=socket.unread_messages,
        unread_bytes=socket.unread_bytes,
        held_bytes=socket.held_bytes,
        rooms=list(socket.rooms),
    )
