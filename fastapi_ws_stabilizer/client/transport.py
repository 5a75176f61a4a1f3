"""Interface to one WebSocket of a client, and the default function that opens it."""

from __future__ import annotations

import importlib
from collections.abc import Awaitable, Callable, Sequence
from types import ModuleType
from typing import Any, Protocol

from fastapi_ws_stabilizer.client.errors import HttpRejection


class TransportClosedError(Exception):
    """The WebSocket is closed.

    Attributes:
        code: Close code; 1006 without one.
        reason: Close reason.
        rejection: HTTP response of the server if it rejected the handshake; otherwise `None`.
    """

    def __init__(self, code: int, reason: str = "", rejection: HttpRejection | None = None) -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason
        self.rejection = rejection


class UnreadableMessageError(TransportClosedError):
    """The WebSocket is closed, because a message of the server is too large, not UTF-8 or not a valid frame.

    Attributes:
        why: What is wrong with the message.
    """

    def __init__(self, why: str) -> None:
        super().__init__(4412, f"unreadable message of the server: {why}")
        self.why = why


class Transport(Protocol):
    """Open WebSocket.

    `received` and `send_progress` are optional. Without them the client sees complete messages only.
    """

    @property
    def subprotocol(self) -> str | None:
        """The subprotocol that the server has selected."""

    @property
    def compresses(self) -> bool:
        """Whether permessage-deflate was negotiated, so that no other compression is needed."""

    async def send(self, message: str | bytes) -> None:
        """Send a message, and wait while the network accepts no data.

        Raises:
            TransportClosedError: The WebSocket is closed.
        """

    async def receive(self) -> str | bytes:
        """Return the next message. Cancelling is safe.

        Raises:
            TransportClosedError: The WebSocket is closed.
        """

    def received(self) -> tuple[int, float]:
        """Return the bytes received so far and the monotonic time of the last ones; zeros if unknown."""

    def send_progress(self) -> int | None:
        """Return a number that increases as the peer acknowledges bytes; `None` if unknown."""

    async def close(self, code: int, reason: str) -> None:
        """Close the WebSocket. Cancelling aborts it."""


Connect = Callable[[str, Sequence[str]], Awaitable[Transport]]
"""Function that opens a WebSocket to a URL with the offered subprotocols. It can be cancelled.

It raises `TransportClosedError` if that fails, or `ClientClosedError` with a final code if it can never succeed."""


def default_connector(options: dict[str, Any]) -> Connect:
    """Return a connect function that uses the `websockets` library.

    Args:
        options: Options of the library's `connect`: `ssl`, `additional_headers`, ...

    Raises:
        ImportError: The library is not installed. The error says how to install it.
    """
    dial: Connect = _library().connector(options)
    return dial


def default_options() -> frozenset[str]:
    """Return the names of the options that `default_connector` accepts.

    Raises:
        ImportError: The library is not installed. The error says how to install it.
    """
    names: frozenset[str] = _library().OPTIONS
    return names


def _library() -> ModuleType:
    try:
        return importlib.import_module("fastapi_ws_stabilizer.client.websockets_transport")
    except ImportError as missing:
        raise ImportError(
            'the client needs the websockets library: pip install "fastapi-ws-stabilizer[client]"'
        ) from missing
