"""What a server can offer beyond ASGI, and what it is told: the two sides of a `DirectTransport`.

A server that has it puts `EXTENSION` into the `extensions` of the ASGI scope, and the object whose `receive` and `send`
it hands to the application is the `DirectTransport`. It is used only if no middleware stands between: one that wraps
`receive` or `send` wants to see the messages.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Protocol

EXTENSION: Final = "fastapi_ws_stabilizer"


def has_direct_transport(scope: Mapping[str, Any]) -> bool:
    """Whether the server of this connection has one."""
    return EXTENSION in (scope.get("extensions") or {})


class DirectReceiver(Protocol):
    """The application's end of a link. Nothing here waits, and nothing raises."""

    def data_received(self) -> bool:
        """Bytes have come in: the client lives. `False` if nobody wants its messages any more."""

    def message_received(self, message: str | bytes) -> None:
        """A message has come in."""

    def ping_received(self) -> None:
        """A ping frame has come in, and is answered."""

    def pong_received(self, payload: bytes) -> None:
        """A pong frame has come in."""

    def connection_lost(self, event: Mapping[str, Any]) -> None:
        """The connection is over; `event` is the ASGI `websocket.disconnect`."""

    def pause_writing(self) -> None:
        """The transport holds more than it should. What is written then is kept, without a limit."""

    def resume_writing(self) -> None:
        """The transport takes more again."""

    def before_shutdown(self) -> None:
        """The server is about to close: what is queued can be written now, or never."""


class DirectTransport(Protocol):
    """The server's end of a link.

    Attributes:
        write_paused: Whether the transport holds more than it should.
        window_bits: Base-2 logarithm of the window for compressed frames; 0 if compression was not negotiated.
    """

    write_paused: bool
    window_bits: int

    @property
    def transport(self) -> Any:
        """The asyncio transport; its `write` is all that senders use."""

    @property
    def in_use(self) -> bool:
        """Whether somebody is waiting in `receive` or `send` at this moment, and would wait for ever."""

    def refuse_compression(self) -> None:
        """Negotiate no compression. Has an effect before the connection is accepted."""

    def attach(self, sink: DirectReceiver, *, max_message_bytes: int, own_pings: bool) -> None:
        """Hand everything that comes in to `sink`, beginning with what has come in already.

        Args:
            sink: Who gets it.
            max_message_bytes: A larger message closes 1009 before it is read whole, or inflated.
            own_pings: Whether the sink sends pings, so that the server need not.
        """

    def ping(self, payload: bytes) -> None:
        """Write a ping frame."""

    def close(self, code: int, reason: str) -> None:
        """Write a close frame, and close the transport when the client has answered, or after a while."""

    def pause_reading(self) -> None:
        """Read no more bytes from the network."""

    def resume_reading(self) -> None:
        """Read again."""
