"""What is known of a client that asks for a connection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastapi_ws_stabilizer.connection.pending import PendingConnection
from fastapi_ws_stabilizer.handshake.admission import Handshake
from fastapi_ws_stabilizer.memory.budget import MemoryBudget
from fastapi_ws_stabilizer.sessions.session import Session
from fastapi_ws_stabilizer.socket import SocketServices, StableSocket


class ServeOptions(NamedTuple):
    """What an endpoint says of its connection.

    Attributes:
        client_id: The client id; `None` if the endpoint names none.
        identity: The result of the identity dependency.
        expires_in: Seconds until the identity expires; `None` for no expiry.
        control_frames: Whether text pings and pongs are answered and hidden from the endpoint.
    """

    client_id: str | None = None
    identity: Any = None
    expires_in: float | None = None
    control_frames: bool = True


@dataclass
class ConnectionRequest:
    """Request of a client for a connection, from its identification until the connection is built.

    Attributes:
        handshake: The admitted handshake.
        client_id: The client id, as far as it is known.
        options: What the endpoint says.
        services: What all sockets share.
        budget: Memory budget of all connections.
        identity_expiry: Expiry of the identity in monotonic time; `None` for no expiry.
        claimed: Client id of the reconnect token of a plain client; `None` without a valid token.
        has_used_token: Whether the client has used up its reconnect token for the connection.
        expires_in: Seconds until the credential in the hello expires; `None` for no expiry.
        session: The session that was negotiated; `None` for a plain client.
        stand_in: The stand-in for the connection; `None` if nothing has needed it.
    """

    handshake: Handshake
    client_id: str
    options: ServeOptions
    services: SocketServices
    budget: MemoryBudget
    identity_expiry: float | None = None
    claimed: str | None = None
    has_used_token: bool = False
    expires_in: float | None = None
    session: Session | None = None
    stand_in: PendingConnection | None = None

    def pending(self, metadata: Mapping[str, Any] | None = None) -> PendingConnection:
        """Return the stand-in for the connection, with the socket of hooks. The first call creates both.

        Raises:
            MemoryLimitExceededError: The metadata exceeds the memory limit.
        """
        if self.stand_in is None:
            pending = self.stand_in = PendingConnection(self.handshake.websocket, self.client_id, self.budget)
            pending.socket = StableSocket(pending, self.services, metadata=metadata, identity=self.options.identity)
        return self.stand_in

    def identify(self, client_id: str) -> None:
        """Set the client id, for hooks too."""
        self.client_id = self.pending().client_id = client_id

    def reject(self) -> None:
        """Drop what hooks have stored, because the client gets no connection."""
        if self.stand_in is not None:
            self.stand_in.reject()
