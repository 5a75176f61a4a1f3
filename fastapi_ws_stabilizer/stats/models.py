"""Totals of a manager, as a response model."""

from __future__ import annotations

from pydantic import BaseModel, Field

from fastapi_ws_stabilizer.gc_pacing import PACER
from fastapi_ws_stabilizer.manager import WebSocketConnectionManager


class StatsSummary(BaseModel):
    """Current totals of a manager, and its counters since it was created."""

    # The descriptions are the help of the Prometheus metrics too.
    connections: int = Field(description="Open connections.")
    clients: int = Field(description="Connected clients. A client can have several connections.")
    queued_messages: int = Field(description="Messages waiting to be sent.")
    queued_bytes: int = Field(description="Bytes waiting to be sent.")
    unread_messages: int = Field(description="Received messages waiting to be read.")
    total_memory: int = Field(
        description="Bytes held for connections and sessions. A message in several queues counts once."
    )
    uptime_seconds: float = Field(description="Seconds since the manager started.")
    connections_opened: int = Field(description="Connections opened.")
    messages_received: int = Field(description="Messages received, without control frames.")
    messages_sent: int = Field(description="Messages that the server accepted for sending, with control frames.")
    messages_refused: int = Field(description="Messages refused because their client exceeded a rate limit.")
    messages_discarded: int = Field(
        description="Messages not yet read, sent or acknowledged when their connection or session ended."
    )
    messages_dropped: int = Field(description="Messages dropped because their client is slow.")
    messages_coalesced: int = Field(
        description="Queued messages replaced by a newer message with the same coalesce_key."
    )
    slow_clients: dict[str, int] = Field(description="Slow consumer events, by state.")
    rooms: int = Field(description="Rooms that have a client, connected or detached.")
    sessions: int = Field(description="Sessions of stabilizer.v1.json clients, with or without a connection.")
    sessions_away: int = Field(description="Sessions without a connection, which a client can resume.")
    sessions_resumed: int = Field(description="Sessions resumed without a gap, and states of plain clients restored.")
    session_gaps: int = Field(description="Sessions resumed too late to replay every missed message.")
    sessions_lost: int = Field(
        description="Resumes that failed because the session or its token is unknown or expired."
    )
    bad_messages: int = Field(description="Messages that no handler accepted.")
    broadcasts: int = Field(description="Broadcasts.")
    pings_sent: int = Field(description="Heartbeat pings sent.")
    refusals: dict[str, int] = Field(
        description="Handshakes rejected, by the option that rejected them, or by a close code."
    )
    evictions: int = Field(description="Connections, sessions and detached states removed because memory was short.")
    endings: dict[str, int] = Field(description="Connections closed, by reason.")
    gc_full_collections: int = Field(
        description="Full collections of Python's garbage collector in this process, from the first start of a manager."
    )
    gc_full_seconds: float = Field(description="Seconds for which these full collections blocked the process.")


def summarize(manager: WebSocketConnectionManager) -> StatsSummary:
    """Read the totals of a manager. This visits every open connection.

    Any thread may call this. Outside the event loop's thread, the numbers may come from different moments.
    """
    sockets = manager.get_sockets()
    counters = manager.counters
    return StatsSummary(
        connections=len(sockets),
        clients=len(manager.get_active_connections()),
        queued_messages=sum(socket.queued_messages for socket in sockets),
        queued_bytes=sum(socket.queued_bytes for socket in sockets),
        unread_messages=sum(socket.unread_messages for socket in sockets),
        total_memory=int(manager.get_memory_usage()["total_memory"]),
        uptime_seconds=manager.uptime_seconds,
        connections_opened=counters.connections_opened,
        messages_received=counters.messages_received,
        messages_sent=counters.messages_sent,
        messages_refused=counters.messages_refused,
        messages_discarded=counters.messages_discarded,
        messages_dropped=counters.messages_dropped,
        messages_coalesced=counters.messages_coalesced,
        slow_clients=dict(counters.slow_clients),
        rooms=len(manager.get_rooms()),
        sessions=manager.get_session_counts()["sessions"],
        sessions_away=manager.get_session_counts()["away"],
        sessions_resumed=counters.sessions_resumed,
        session_gaps=counters.session_gaps,
        sessions_lost=counters.sessions_lost,
        bad_messages=counters.bad_messages,
        broadcasts=counters.broadcasts,
        pings_sent=counters.pings_sent,
        refusals=dict(counters.refusals),
        evictions=counters.evictions,
        endings={reason.value: count for reason, count in dict(counters.endings).items()},
        gc_full_collections=PACER.full_collections,
        gc_full_seconds=PACER.full_seconds,
    )
