"""The stats router: totals, connections and health as JSON, and metrics for Prometheus.

It shows client ids and addresses, and has no access control. Protect it with a FastAPI dependency:
`app.include_router(stats_router, prefix="/ws-stats", dependencies=[Depends(admin)])`.
"""

from __future__ import annotations

import importlib
import secrets
from typing import Annotated, Final

from fastapi import APIRouter, Depends, Header, HTTPException, Query, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, Field

from fastapi_ws_stabilizer.dependencies import find_manager
from fastapi_ws_stabilizer.manager import WebSocketConnectionManager
from fastapi_ws_stabilizer.shutdown.drain import ShutdownReport
from fastapi_ws_stabilizer.socket import StableSocket
from fastapi_ws_stabilizer.stats.models import StatsSummary, summarize

EXPORTER: Final = "fastapi_ws_stabilizer.stats.prometheus"


class ConnectionStats(BaseModel):
    """One open connection."""

    connection_id: str
    client_id: str
    session_id: str | None = Field(description="The session; null for a plain client.")
    address: str = Field(description="Address of the client; behind `trusted_proxies`, the address that they report.")
    connected_seconds: float
    silent_seconds: float = Field(description="Seconds since the last frame from the client.")
    rtt_seconds: float | None = Field(description="Last measured round trip; null before the first answered ping.")
    queued_messages: int
    queued_bytes: int
    dropped_messages: int = Field(description="Messages dropped because the client is slow.")
    unread_messages: int
    unread_bytes: int
    held_bytes: int = Field(description="Bytes of memory held for the connection, or for its session.")
    rooms: list[str]


class ConnectionPage(BaseModel):
    """A page of the open connections, oldest first."""

    total: int
    offset: int
    connections: list[ConnectionStats]


class Health(BaseModel):
    """State of the manager."""

    status: str = Field(description="`ok`, or `shut_down`.")
    connections: int


def _manager(request: Request) -> WebSocketConnectionManager:
    return find_manager(request)


Manager = Annotated[WebSocketConnectionManager, Depends(_manager)]

stats_router: APIRouter = APIRouter(tags=["websocket stats"])


@stats_router.get("/", summary="Totals")
async def overview(manager: Manager) -> StatsSummary:
    """Return the current totals of the manager, and its counters since it was created."""
    return summarize(manager)


@stats_router.get("/connections", summary="Open connections")
async def connections(
    manager: Manager,
    client_id: Annotated[str | None, Query(description="Only those of this client.")] = None,
    offset: Annotated[int, Query(ge=0)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> ConnectionPage:
    """Return a page of the open connections, oldest first."""
    sockets = manager.get_sockets(client_id)
    page = [_connection_stats(socket) for socket in sockets[offset : offset + limit]]
    return ConnectionPage(total=len(sockets), offset=offset, connections=page)


@stats_router.get("/connections/{connection_id}", summary="One connection")
async def connection(manager: Manager, connection_id: str) -> ConnectionStats:
    """Return one open connection; 404 if no open connection has this id."""
    socket = manager.get_socket(connection_id)
    if socket is None:
        raise HTTPException(404, "no open connection has this id")
    return _connection_stats(socket)


@stats_router.get(
    "/metrics",
    summary="Metrics",
    response_class=PlainTextResponse,
    responses={
        404: {"description": "`enable_metrics` is off."},
        501: {"description": "The server lacks the extra `metrics`."},
    },
)
async def metrics(manager: Manager, request: Request) -> Response:
    """Return all metrics in the text format of Prometheus, or as OpenMetrics if `Accept` asks for it."""
    if manager.events.timings is None:
        raise HTTPException(404, "metrics are off: turn them on with WebSocketConfig(enable_metrics=True)")
    try:
        exporter = importlib.import_module(EXPORTER)  # prometheus-client is optional
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] != "prometheus_client":
            raise
        detail = 'metrics need prometheus-client: pip install "fastapi-ws-stabilizer[metrics]"'
        raise HTTPException(501, detail) from error
    body, content_type = exporter.render_metrics(manager, ",".join(request.headers.getlist("accept")))
    return Response(body, media_type=content_type)


@stats_router.get("/health", summary="Health", responses={503: {"model": Health}})
async def health(manager: Manager, response: Response) -> Health:
    """Return 200 while the manager accepts connections, and 503 once a drain or shutdown has begun."""
    if not manager.running:
        response.status_code = 503
    return Health(status="ok" if manager.running else "shut_down", connections=manager.get_connection_count())


@stats_router.get("/health/live", summary="Liveness")
async def live() -> dict[str, str]:
    """Return 200 while the process answers requests."""
    return {"status": "ok"}


@stats_router.get("/health/ready", summary="Readiness", responses={503: {"model": Health}})
async def ready(manager: Manager, response: Response) -> Health:
    """Return 200 while the manager accepts connections, and 503 once a drain or shutdown has begun."""
    return await health(manager, response)


@stats_router.post(
    "/drain", summary="Drain", responses={403: {"description": "`drain_secret` is not set or does not match."}}
)
async def drain(
    manager: Manager,
    authorization: Annotated[str, Header(description="`Bearer` followed by the `drain_secret`.")] = "",
    timeout: Annotated[float, Query(gt=0, le=3600, description="Seconds that the drain may take.")] = 30.0,
) -> ShutdownReport:
    """Drain: reject new connections and spread the reconnects of open ones over a window. For `preStop` hooks."""
    secret = manager.config.drain_secret
    if secret is None:
        raise HTTPException(403, "drain_secret is not set: set it to allow a drain over HTTP")
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
