"""Address of a client, from its transport or from the headers of trusted proxies."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import WebSocket

from fastapi_ws_stabilizer.compat.starlette import asgi_callables
from fastapi_ws_stabilizer.connection.server_transport import ServerTransport
from fastapi_ws_stabilizer.net.proxies import TrustedProxies
from fastapi_ws_stabilizer.wire.handshake import header_values


class ClientAddressResolver:
    """Resolver of the addresses of clients behind trusted proxies.

    Args:
        trusted_proxies: The option `trusted_proxies`.
    """

    def __init__(self, trusted_proxies: Sequence[str]) -> None:
        self._proxies = TrustedProxies(trusted_proxies)
        self._has_proxies = bool(trusted_proxies)

    def address_of(self, websocket: WebSocket) -> str:
        """Return the address of a client: as a trusted proxy reports it, else the address of the peer."""
        return self._proxies.client_address(
            self._peer_of(websocket), header_values(websocket.scope, b"x-forwarded-for")
        )

    def hosts_of(self, websocket: WebSocket) -> list[str]:
        """Return the hosts of this server that a handshake names: in Host, and in X-Forwarded-Host of a proxy."""
        hosts = header_values(websocket.scope, b"host")
        if self._has_proxies and self._proxies.trusts(self._peer_of(websocket)):
            forwarded = header_values(websocket.scope, b"x-forwarded-host")
            hosts += [host.strip() for value in forwarded for host in value.split(",")]
        return hosts

    def _peer_of(self, websocket: WebSocket) -> str | None:
        """Return the address of the peer; without `trusted_proxies`, the address that the server reports.

        A server that trusts X-Forwarded-For reports an address from that header instead of the proxy's, and a client
        may have forged it. So with `trusted_proxies` the address comes from the transport, if it can be reached.
        """
        peer = ServerTransport(*asgi_callables(websocket)).peer if self._has_proxies else None
        if peer is not None:
            return peer
        return None if websocket.client is None else websocket.client.host
