"""Reader of a connection on uvicorn's own protocol class, which replaces the read pump and needs no task."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from fastapi_ws_stabilizer.compat.uvicorn import PushedEvents, push_events
from fastapi_ws_stabilizer.connection.push_reader import PushReader

if TYPE_CHECKING:
    from fastapi_ws_stabilizer.connection.connection import Connection

_LOST: Final = AttributeError
"""What the TLS transport of Python 3.10 raises after its connection was lost."""


class UvicornReader(PushReader):
    """Reader of a connection on uvicorn's own protocol class.

    uvicorn parses a whole read at once. When the inbox is full, the messages that are left of it are held until there
    is room. Until then they are neither processed nor counted.

    Args:
        connection: The connection.
        protocol: The server's protocol object.
    """

    __slots__ = ("_events", "_transport")

    def __init__(self, connection: Connection, protocol: Any) -> None:
        super().__init__(connection)
        self._transport: asyncio.Transport = protocol.transport
        self._events = PushedEvents(self)
        push_events(protocol, self._events)

    def _pause_reading(self) -> None:
        self._events.hold()
        with suppress(_LOST):
            self._transport.pause_reading()

    def _resume_reading(self) -> None:
        if self._events.holds_messages:  # scheduled, because the caller may be the inbox
            context = self._connection.outbox.limits.context
            asyncio.get_running_loop().call_soon(self._release, context=context)
        else:
            self._release()

    def _release(self) -> None:
        """Process the held messages while there is room, then read more."""
        if self._events.release():
            with suppress(_LOST):
                self._transport.resume_reading()

    def connection_lost(self, event: Mapping[str, Any]) -> None:
        """Start teardown after the server has lost the connection.

        uvicorn reports its own close frame like this too. A closing connection has sent it, or finds out when it sends.
        """
        if self._connection.close_info is None:
            super().connection_lost(event)

    def stop(self) -> None:
        """Stop waiting for room in the inbox, and ignore all further events."""
        super().stop()
        self._events.stop()
