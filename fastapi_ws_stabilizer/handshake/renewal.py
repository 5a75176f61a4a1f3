"""Renewal of the credential of an open connection, which the `on_auth` hooks verify."""

from __future__ import annotations

from fastapi_ws_stabilizer.connection.connection import Connection
from fastapi_ws_stabilizer.errors import close_info_for
from fastapi_ws_stabilizer.handlers.hooks import HookRegistry
from fastapi_ws_stabilizer.tasks import TaskSet, copied


class CredentialRenewer:
    """Verifier of the credentials that clients send before their old ones expire.

    Args:
        hooks: The auth hooks.
        tasks: Set that holds the tasks of renewals.
    """

    def __init__(self, hooks: HookRegistry, tasks: TaskSet) -> None:
        self._hooks = hooks
        self._tasks = tasks

    def start(self, connection: Connection, credential: str | None) -> None:
        """Start a task that verifies a new credential of a client. A rejection closes the connection."""
        renewing = self._renew(connection, credential)
        context = copied(connection.context)
        self._tasks.spawn(renewing, name=f"ws-auth-{connection.connection_id}", context=context)

    async def _renew(self, connection: Connection, credential: str | None) -> None:
        expiry = connection.credential
        if expiry is None:
            return
        if credential is None:
            expiry.renewal_rejected(connection, "missing credential")
            return
        if not self._hooks.has("auth"):  # no hook can verify it
            expiry.renewal_rejected(connection, "credential renewal is not supported")
            return
        try:
            expires_in = await self._hooks.auth(connection.socket, credential)
        except Exception as error:
            close_info = close_info_for(error)
            connection.close(close_info.cause, code=close_info.code, reason=close_info.reason)
        else:
            expiry.renewed(connection, expires_in)
