"""A listener of connections without a node."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from fastapi_ws_stabilizer.close_codes import CloseInfo, DisconnectReason
from fastapi_ws_stabilizer.connection.connection import Connection
from fastapi_ws_stabilizer.connection.outbox import SlowConsumer
from fastapi_ws_stabilizer.connection.resources import ConnectionListener
from fastapi_ws_stabilizer.errors import close_info_for, is_bug


@dataclass
class RecordingListener(ConnectionListener):
    """Listener that records its calls.

    Attributes:
        disconnect_hook: Function that runs as a disconnect hook.
    """

    admitted: list[Connection] = field(default_factory=list)
    closing: list[Connection] = field(default_factory=list)
    closed: list[Connection] = field(default_factory=list)
    evicted: list[Connection] = field(default_factory=list)
    slow: list[SlowConsumer] = field(default_factory=list)
    disconnected: list[DisconnectReason | None] = field(default_factory=list)
    session_ends: list[Connection] = field(default_factory=list)
    bugs: list[BaseException] = field(default_factory=list)
    disconnect_hook: Callable[[Connection], Awaitable[None]] | None = None

    def on_admitted(self, connection: Connection) -> None:
        """Record the connection."""
        self.admitted.append(connection)

    def on_closing(self, connection: Connection) -> None:
        """Record the connection."""
        self.closing.append(connection)

    def on_closed(self, connection: Connection) -> None:
        """Record the connection."""
        self.closed.append(connection)

    def on_evicted(self, connection: Connection) -> None:
        """Record the connection."""
        self.evicted.append(connection)

    def on_slow(self, _: Connection, state: SlowConsumer) -> None:
        """Record the state."""
        self.slow.append(state)

    async def on_disconnect(self, connection: Connection) -> None:
        """Record the cause of the close, and run the hook."""
        self.disconnected.append(None if connection.close_info is None else connection.close_info.cause)
        if self.disconnect_hook is not None:
            await self.disconnect_hook(connection)

    async def on_session_end(self, connection: Connection) -> None:
        """Record the connection."""
        self.session_ends.append(connection)

    async def on_error(self, _: Connection, error: BaseException) -> None:
        """Record the bug."""
        self.bugs.append(error)

    async def close_info_by_handler(
        self, _: Connection, error: BaseException
    ) -> tuple[CloseInfo, BaseException | None]:
        """Return the close info of an application without exception handlers."""
        return close_info_for(error), error if is_bug(error) else None
