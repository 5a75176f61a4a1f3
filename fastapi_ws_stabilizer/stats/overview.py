"""`StatsSummary`: the totals of a manager."""

from __future__ import annotations

from pydantic import BaseModel, Field

from fastapi_ws_stabilizer.manager import WebSocketConnectionManager


class StatsSummary(BaseModel):
    """What a manager holds now and has counted since it was made."""

    connections: int = Field(description="Open connections.")
    clients: int = Field(description="Connected clients; one can have several connections.")
    queued_messages: int = Field(description="Messages that wait to be sent.")
    queued_bytes: int = Field(description="Bytes that wait to be sent.")
    unread_messages: int = Field(description="Received messages that wait to be read.")
    total_memory: int = Field(description="Bytes held for connections and sessions; what many hold counts once.")
    uptime_seconds: float = Field(description="Seconds since the manager was started.")
    connections_opened: int = Field(description="Connections that were ever opened.")
    messages_received: int = Field(description="Messages that came in, without control frames.")
    messages_sent: int = Field(description="Messages that the server took over, control frames included.")
    messages_refused: int = Field(description="Messages of clients that sent more than they may.")
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
    refusals: dict[str, int] = Field(
        description="Handshakes that were turned away, by the option that said so, else by a close code."
    )
    evictions: int = Field(description="Connections and sessions that went because memory was short.")
    endings: dict[str, int] = Field(description="Ended connections by reason.")


def overview_of(manager: WebSocketConnectionManager) -> StatsSummary:
    """What a manager holds now and has counted since it was made."""
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
        endings={reason.value: count for reason, count in counters.endings.items()},
    )
