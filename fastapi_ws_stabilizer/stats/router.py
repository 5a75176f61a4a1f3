"""The stats router: totals, connections and health as JSON.

Whoever can read it sees client ids. Protect it by FastAPI's own means:
`app.include_router(stats_router, prefix="/ws-stats", dependencies=[Depends(admin)])`.
"""

from __future__ import annotations

import secrets
from typing import Annotated

from fastapi import APIRouter, Depends, Header, HTTPException, Query, Request, Response
from pydantic import BaseModel, Field

from fastapi_ws_stabilizer.connection.socket import StableSocket
from fastapi_ws_stabilizer.dependencies import find_manager
from fastapi_ws_stabilizer.manager import WebSocketConnectionManager
from fastapi_ws_stabilizer.shutdown.closing import ShutdownReport


class Overview(BaseModel):
    """What a manager holds now and has counted since it was made."""

    connections: int = Field(description="Open connections.")
    clients: int = Field(description="Connected clients; one can have several connections.")
    queued_messages: int = Field(description="Messages that wait to be sent.")
    queued_bytes: int = Field(description="Bytes that wait to be sent.")
    unread_messages: int = Field(description="Received messages that wait to be read.")
    uptime_seconds: float = Field(description="Seconds since the manager was started.")
    connections_opened: int = Field(description="Connections that were ever opened.")
    messages_received: int = Field(description="Messages that came in, without control frames.")
    messages_sent: int = Field(description="Messages that the server took over, control frames included.")
    messages_discarded: int = Field(description="Messages whose connection ended before they were read or sent.")
    messages_dropped: int = Field(description="Messages that were thrown away because their client is slow.")
    messages_coalesced: int = Field(description="Messages in whose place a newer one was sent.")
    slow_clients: dict[str, int] = Field(description="How often clients have become slow, by how slow.")
    rooms: int = Field(description="Rooms that somebody is in.")
    sessions: int = Field(description="Sessions of stabilizer.v1.json clients, with a connection or without.")
    sessions_away: int = Field(description="Sessions that wait for their clients to come back.")
    sessions_resumed: int = Field(description="How often a client came back and got what it had.")
    session_gaps: int = Field(description="How often a client came back too late for what it had missed.")
    sessions_lost: int = Field(description="How often a client came back for a session that is not here any more.")
    bad_messages: int = Field(description="Messages that no handler could take.")
    broadcasts: int = Field(description="Broadcasts.")
    pings_sent: int = Field(description="Heartbeats.")
    endings: dict[str, int] = Field(description="Ended connections by reason.")


class ConnectionStats(BaseModel):
    """One open connection."""

    connection_id: str
    client_id: str
    session_id: str | None = Field(description="Its session; null for a plain client.")
    address: str | None = Field(description="Address of the other end, which may be a proxy.")
    connected_seconds: float
    silent_seconds: float = Field(description="Seconds since the last frame from the client.")
    rtt_seconds: float | None = Field(description="Last measured round trip; null before the first answered ping.")
    queued_messages: int
    queued_bytes: int
    dropped_messages: int = Field(description="Messages that were thrown away because the client is slow.")
    unread_messages: int
    unread_bytes: int
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
async def overview(manager: Manager) -> Overview:
    """What the manager holds now and has counted since it was made."""
    sockets = manager.get_sockets()
    totals = manager.totals
    return Overview(
        connections=len(sockets),
        clients=len(manager.get_active_connections()),
        queued_messages=sum(socket.queued_messages for socket in sockets),
        queued_bytes=sum(socket.queued_bytes for socket in sockets),
        unread_messages=sum(socket.unread_messages for socket in sockets),
        uptime_seconds=manager.uptime_seconds,
        connections_opened=totals.connections_opened,
        messages_received=totals.messages_received,
        messages_sent=totals.messages_sent,
        messages_discarded=totals.messages_discarded,
        messages_dropped=totals.messages_dropped,
        messages_coalesced=totals.messages_coalesced,
        slow_clients=dict(totals.slow_clients),
        rooms=len(manager.get_rooms()),
        sessions=manager.get_session_counts()["sessions"],
        sessions_away=manager.get_session_counts()["away"],
        sessions_resumed=totals.sessions_resumed,
        session_gaps=totals.session_gaps,
        sessions_lost=totals.sessions_lost,
        bad_messages=totals.bad_messages,
        broadcasts=totals.broadcasts,
        pings_sent=totals.pings_sent,
        endings={reason.value: count for reason, count in totals.endings.items()},
    )


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
        address=None if socket.client is None else f"{socket.client.host}:{socket.client.port}",
        connected_seconds=socket.connected_seconds,
        silent_seconds=socket.silent_seconds,
        rtt_seconds=socket.rtt,
        queued_messages=socket.queued_messages,
        queued_bytes=socket.queued_bytes,
        dropped_messages=socket.dropped_messages,
        unread_messages=socket.unread_messages,
        unread_bytes=socket.unread_bytes,
        rooms=list(socket.rooms),
    )
