"""Tokens and tickets: how clients prove that they may come, or come back, and how that right is taken away."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import HTTPException
from starlette.requests import HTTPConnection

from fastapi_ws_stabilizer.close_codes import SESSION_ENDED, DisconnectReason
from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.connection.socket import StableSocket
from fastapi_ws_stabilizer.errors import (
    InvalidTokenError,
    TokenExpiredError,
)
from fastapi_ws_stabilizer.identity.tickets import Tickets
from fastapi_ws_stabilizer.reports import EventBus
from fastapi_ws_stabilizer.routing.serving import Node
from fastapi_ws_stabilizer.servers.workers import several_workers
from fastapi_ws_stabilizer.sessions.tokens import ReconnectTokens
from fastapi_ws_stabilizer.wire.names import check_client_id


class Passes:
    """The part of a manager that gives out passes, and takes them."""

    config: WebSocketConfig
    events: EventBus
    _node: Node
    _tokens: ReconnectTokens
    _tickets: Tickets
    _reported_workers: bool

    # ── coming back ──

    def generate_reconnect_token(self, client: str | StableSocket) -> str:
        """Make a token by which a plain client gets the rooms and user data of a connection back after a disconnect.

        It is good once, for `reconnect_token_ttl`, and for this client id. The client presents it as
        `?reconnect_token=` of its next connection, or in any way that leads to `validate_reconnect_token`. Without
        `reconnect_secret` it is good in this process only. A client of `stabilizer.v1.json` needs none: it has its own,
        in each welcome.

        Args:
            client: The socket whose rooms and user data it is for: `ws.reconnect_token()` says the same. Or a client
                id, which means the connection of the current endpoint, handler or hook if that has this id, else the
                client's newest one; if none is open, what the client has left last.

        Raises:
            ValueError: The client id is empty, or breaks the rule for names.
            InvalidTokenError: `enable_reconnect` is False.
            SocketClosed: The socket is closed.
            WrongLoopError: This is another thread or event loop than the manager's.
        """
        if isinstance(client, StableSocket):
            return client.reconnect_token()
        check_client_id(client)
        self._node.hub.check_loop()
        self._report_workers()
        newest = next(reversed(self._node.resolve(client)), None)
        return self._node.resumption.issue_token(client, newest)

    def _report_workers(self) -> None:
        if self.config.reconnect_secret is None and not self._reported_workers and several_workers():
            self._reported_workers = True
            self.events.emit("reconnect_secret_missing", logging.WARNING)

    async def validate_reconnect_token(self, token: str) -> str:
        """Use a token up, and return the client id that it was issued for.

        The token of a client that you have kicked stays good for `session_ttl`: `connect()` tells it so at each dial.

        The next `connect()` of that client in the same task gets its rooms and its user data back. Compare what this
        returns with the client id that you connect, if that one comes from somewhere else.

        Raises:
            InvalidTokenError: It is no token, was altered, was signed with another secret, or was used before.
            TokenExpiredError: Its time is over.
        """
        if not self.config.enable_reconnect:
            raise InvalidTokenError("disabled")
        self._node.hub.check_loop()
        claim = self._node.resumption.consume(token)
        self._node.resumption.mark_verified(claim)
        return claim.client_id

    # ── tickets ──

    def issue_ticket(self, client_id: str) -> str:
        """Make a ticket with which a client comes in once, for an HTTP route that knows who asks for it.

        It is good for `ticket_ttl` seconds. Without `reconnect_secret` it is good in this process only.

        Raises:
            ValueError: `client_id` is empty, or breaks the rule for names.
        """
        self._report_workers()
        return self._tickets.issue(client_id)

    async def ticket(self, connection: HTTPConnection) -> str:
        """The dependency that takes the ticket in `?ticket=`: `Depends(manager.socket_for(manager.ticket))`.

        Returns:
            The client id that it was issued for.

        Raises:
            HTTPException: 401: there is none, or it is not good.
        """
        ticket = connection.query_params.get("ticket")
        if ticket is None:
            raise HTTPException(401, "a ticket is wanted, as ?ticket=")
        try:
            return self._tickets.redeem(ticket)
        except (InvalidTokenError, TokenExpiredError) as error:
            self.events.emit("ticket_refused", logging.INFO, why=getattr(error, "problem", "expired"))
            raise HTTPException(401, error.reason) from error

    # ── taking the right away ──

    async def revoke(self, client_id: str, reason: str = "revoked") -> int:
        """Take a client's right to be here: close all its connections with 4410, and end its sessions.

        Reconnect tokens and tickets that were issued for it before are not good any more. What is issued later is, so
        somebody who may log in again can come back.

        Args:
            client_id: Whose right.
            reason: What its connections are told.

        Returns:
            How many connections and sessions were ended.

        Raises:
            ValueError: `client_id` is empty, or no `str`: nobody would be shut out.
        """
        if not client_id or not isinstance(client_id, str):
            raise ValueError(f"client_id must be a str that is not empty, not {client_id!r}")
        self._node.hub.check_loop()
        self._tokens.revoke(client_id)
        self._tickets.revoke(client_id)
        node = self._node
        node.admission.revoke(client_id)
        ended: list[Any] = [*node.registry.of_client(client_id), *node.resumption.detached_of(client_id)]
        for one in ended:
            one.close(DisconnectReason.APPLICATION, code=SESSION_ENDED, text=reason, from_outside=True)
        node.resumption.forget(client_id)
        self.events.emit("client_revoked", logging.INFO, client_id=client_id, ended=len(ended))
        return len(ended)
