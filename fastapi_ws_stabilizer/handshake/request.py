"""What is known of a client that asks for a connection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from fastapi_ws_stabilizer.connection.pending import PendingConnection
from fastapi_ws_stabilizer.handshake.admission import Handshake
from fastapi_ws_stabilizer.sessions.session import Session


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
        pending: The stand-in for the connection, with the client id and the socket of hooks.
        options: What the endpoint says.
        identity_expiry: Expiry of the identity in monotonic time; `None` for no expiry.
        claimed: Client id of the reconnect token of a plain client; `None` without a valid token.
        has_used_token: Whether the client has used up its reconnect token for the connection.
        expires_in: Seconds until the credential in the hello expires; `None` for no expiry.
        session: The session that was negotiated; `None` for a plain client.
    """

    handshake: Handshake
    pending: PendingConnection
    options: ServeOptions
    identity_expiry: float | None = None
    claimed: str | None = None
    has_used_token: bool = False
    expires_in: float | None = None
    session: Session | None = None
