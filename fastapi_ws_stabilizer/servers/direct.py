"""Interfaces between a server and a connection beyond ASGI: `DirectTransport` and `DirectReceiver`.

A server with a direct transport puts `EXTENSION` into the `extensions` of the ASGI scope. The object that owns the
`receive` and `send` of the application is the `DirectTransport`. It is used only without middleware in between, because
a middleware that wraps `receive` or `send` expects to see the messages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

EXTENSION: Final = "fastapi_ws_stabilizer"


class DirectReceiver(Protocol):
    """Application side of a direct transport. Its methods never wait and never raise."""

    def data_received(self) -> bool:
        """Record received bytes as a sign of life; return `False` if messages are no longer wanted."""

    def message_received(self, message: str | bytes) -> None:
        """Process a received message."""

    def ping_received(self) -> None:
        """Record a received ping frame. The server answers it."""

    def pong_received(self, payload: bytes) -> None:
        """Process a received pong frame."""

    def violation_received(self, fail: Callable[[], None]) -> None:
        """Call `fail`, which fails the connection, soon after your code has read the messages before the violation."""

    def connection_lost(self, event: Mapping[str, Any]) -> None:
        """Process the end of the connection; `event` is the ASGI `websocket.disconnect`."""

    def pause_writing(self) -> None:
        """Stop writing, because the transport's buffer is full.

        The transport buffers further data without a limit.
        """

    def resume_writing(self) -> None:
        """Write again, because the transport's buffer has space."""

    def before_shutdown(self) -> None:
        """Flush queued messages, because the server closes the connection next."""


class DirectTransport(Protocol):
    """Server side of a direct transport.

    Attributes:
        write_paused: Whether the transport's buffer is full.
        window_bits: Base-2 logarithm of the window for compressed frames; 0 without compression.
    """

    write_paused: bool
    window_bits: int

    @property
    def transport(self) -> Any:
        """The asyncio transport. Senders use only its `write`."""

    @property
    def in_use(self) -> bool:
        """Whether a call of `receive` or `send` has not returned, and might then wait forever."""

    def refuse_compression(self) -> None:
        """Disable compression. It has an effect only before the connection is accepted."""

    def attach(self, sink: DirectReceiver, *, max_message_bytes: int, own_pings: bool) -> None:
        """Pass everything that arrives to `sink`, starting with what has arrived already.

        Args:
            sink: The receiver.
            max_message_bytes: Maximum message size. A larger message closes the connection with 1009 before it is read
                completely or inflated.
            own_pings: Whether the receiver sends pings, so that the server does not.
        """

    def ping(self, payload: bytes) -> None:
        """Write a ping frame."""

    def close(self, code: int, reason: str) -> None:
        """Write a close frame, and close the transport after the client's answer or a timeout."""

    def pause_reading(self) -> None:
        """Stop reading from the network."""

    def resume_reading(self) -> None:
        """Continue to read."""
