"""The one WebSocket that a client has at a time, and how one is dialled."""

from __future__ import annotations

import importlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol


class TransportClosedError(Exception):
    """The WebSocket is over.

    Attributes:
        code: Its close code; 1006 if there was none.
        reason: Its close reason.
    """

    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason


class UnreadableMessageError(TransportClosedError):
    """The WebSocket is over, because a message of the server is too large or is no UTF-8."""

    def __init__(self, why: str) -> None:
        super().__init__(4412, f"a message of the server cannot be read: {why}")


class Transport(Protocol):
    """A WebSocket that is open.

    One may do without `received` and `send_progress`: then only whole messages are seen.
    """

    @property
    def subprotocol(self) -> str | None:
        """What the server has chosen."""

    @property
    def compresses(self) -> bool:
        """Whether permessage-deflate was agreed on, so that nothing else need compress."""

    async def send(self, message: str | bytes) -> None:
        """Send a message; wait while the network takes none.

        Raises:
            TransportClosedError: It is over.
        """

    async def receive(self) -> str | bytes:
        """Wait for the next message. Cancelling is safe.

        Raises:
            TransportClosedError: It is over.
        """

    def received(self) -> tuple[int, float]:
        """Bytes that have come in so far, and when the last came, on the monotonic clock; zeros if not known."""

    def send_progress(self) -> int | None:
        """A number that has grown if the other machine has taken bytes since; `None` where that cannot be seen."""

    async def close(self, code: int, reason: str) -> None:
        """Close it. Cancelling cuts it."""


Connect = Callable[[str, Sequence[str]], Awaitable[Transport]]
"""Opens a WebSocket to a URL, offering subprotocols. Can be cancelled.

Raises `TransportClosedError` if that fails, or `ClientClosedError` with a final code if it can never succeed.
"""


def default_connector(**options: Any) -> Connect:
    """Dial with the `websockets` library; `options` are those of its `connect`: `ssl`, `additional_headers`, ...

    Raises:
        ImportError: It is not installed. The error says how to.
    """
    try:
        module = importlib.import_module("fastapi_ws_stabilizer.client.websockets_transport")
    except ImportError as missing:
        raise ImportError(
            'the client needs the websockets library: pip install "fastapi-ws-stabilizer[client]"'
        ) from missing
    dial: Connect = module.connector(options)
    return dial
