"""Transport over the `websockets` library."""

from __future__ import annotations

import asyncio
import inspect
import random
from collections.abc import Iterable, Sequence
from typing import Any, Final

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidHandshake, InvalidStatus, InvalidURI

from fastapi_ws_stabilizer.client.errors import ClientClosedError, HttpRejection, shortened
from fastapi_ws_stabilizer.client.transport import Connect, Transport, TransportClosedError, UnreadableMessageError
from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.net.tcp import send_progress
from fastapi_ws_stabilizer.wire.v1.frames import MAX_SENT_BYTES

INVALID_TARGET: Final = 4400
"""Close code for an invalid URL or invalid options, with which no attempt can succeed."""

CLOSE_GRACE: Final = 0.5
"""Seconds that a server has to close the network connection after its close frame. The library waits for that, and
hypercorn does not close it while messages arrive."""


def _option_names() -> frozenset[str]:
    """Return the options of `connect`, and those that it passes to asyncio for the network connection."""
    of_library = {one.name for one in _parameters(connect.__init__) if one.kind is inspect.Parameter.KEYWORD_ONLY}
    of_network = {one.name for one in _parameters(asyncio.BaseEventLoop.create_connection)} - {
        "self",
        "protocol_factory",
    }
    of_proxy = {f"proxy_{name}" for name in of_network} if "proxy" in of_library else set()
    return frozenset(of_library | of_network | of_proxy | {"unix", "path"})


def _parameters(function: Any) -> Iterable[inspect.Parameter]:
    return inspect.signature(function).parameters.values()


OPTIONS: Final = _option_names()
"""Names of the options of `connector`."""


class CountingConnection(ClientConnection):
    """Connection of the library that counts received bytes, including those of incomplete messages.

    It is a subclass, because the library has no hook for the bytes of an incomplete message. Its option
    `create_connection` is documented for subclasses, and asyncio calls `data_received` on them.

    Attributes:
        received_bytes: Number of bytes received so far.
        received_at: Time of the last received bytes, on the monotonic clock.
    """

    received_bytes = 0
    received_at = 0.0
    _leaves = False

    def data_received(self, data: bytes) -> None:
        """Count the data and pass it on. asyncio calls this method."""
        self.received_bytes += len(data)
        self.received_at = monotonic()
        super().data_received(data)
        if self.protocol.close_rcvd is not None and not self._leaves:
            self._leaves = True
            self.loop.call_later(CLOSE_GRACE, self.transport.close)


class WebSocketsTransport:
    """`Transport` over a connection of the `websockets` library."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    @property
    def subprotocol(self) -> str | None:
        """The subprotocol that the server has selected."""
        chosen: str | None = self._connection.subprotocol
        return chosen

    @property
    def compresses(self) -> bool:
        """See `Transport`."""
        return bool(self._connection.protocol.extensions)

    async def send(self, message: str | bytes) -> None:
        """See `Transport`."""
        try:
            await self._connection.send(message)
        except Exception as error:
            raise self._lost(error) from error

    async def receive(self) -> str | bytes:
        """See `Transport`."""
        try:
            message: str | bytes = await self._connection.recv()
        except Exception as error:
            raise self._lost(error) from error
        return message

    def received(self) -> tuple[int, float]:
        """See `Transport`. The values are zero if the options replace the connection class."""
        connection = self._connection
        return getattr(connection, "received_bytes", 0), getattr(connection, "received_at", 0.0)

    def send_progress(self) -> int | None:
        """See `Transport`."""
        return send_progress(getattr(self._connection, "transport", None))

    async def close(self, code: int, reason: str) -> None:
        """See `Transport`."""
        try:
            await self._connection.close(code, reason)
        except asyncio.CancelledError:
            self._connection.transport.abort()
            raise

    @staticmethod
    def _lost(error: Exception) -> TransportClosedError:
        received = getattr(error, "rcvd", None)
        if received is not None:
            return TransportClosedError(received.code, received.reason)
        sent = getattr(error, "sent", None)
        if sent is not None and sent.code in (1002, 1007, 1009):  # the library has rejected the received data
            return UnreadableMessageError(f"closed with {sent.code} {sent.reason}".rstrip())
        return TransportClosedError(1006, str(error))


def connector(options: dict[str, Any]) -> Connect:
    """Return a connect function with the given options of the library's `connect`.

    The function raises `ClientClosedError` if the URL or the options are invalid, because another attempt would not
    help.
    """

    async def dial(url: str, subprotocols: Sequence[str]) -> Transport:
        opened: list[CountingConnection] = []

        def create(*args: Any, **more: Any) -> CountingConnection:
            opened.append(CountingConnection(*args, **more))
            return opened[-1]

        try:
            connection = await connect(
                url,
                **{
                    "subprotocols": list(subprotocols),
                    "ping_interval": None,  # the protocol has its own pings
                    "open_timeout": None,
                    "close_timeout": 5,
                    "max_size": MAX_SENT_BYTES,
                    "create_connection": create,
                    **options,
                },
            )
        except OSError as error:  # before ValueError: an error for an invalid certificate is both, and is not final
            raise _attempt_error(error) from error
        except (InvalidURI, TypeError, ValueError) as error:
            is_answered = any(connection.received_bytes for connection in opened)
            if is_answered and not isinstance(error, InvalidURI):  # websockets 14, if the answer is not HTTP
                raise _attempt_error(error) from error
            raise ClientClosedError(INVALID_TARGET, f"invalid URL or options: {error}") from error
        except Exception as error:
            raise _attempt_error(error) from error
        return WebSocketsTransport(connection)

    return dial


_FINAL_STATUS: Final = {400: 4400, 401: 4401, 403: 4403, 404: 4404, 406: 4406, 410: 4410}
_PASSING_STATUS: Final = {429: 4429, 503: 4503}


def _attempt_error(error: Exception) -> TransportClosedError:
    """Return the close code that matches a failed attempt.

    Unlike a browser, this client can see the HTTP response.
    """
    if not isinstance(error, InvalidStatus):
        what = str(error) or repr(error)
        if isinstance(error, InvalidHandshake) and error.__cause__ is not None:  # it says what the server has sent
            what = f"{what}: {error.__cause__}"
        return TransportClosedError(1006, shortened(what))
    response = error.response
    status = response.status_code
    rejection = HttpRejection.from_response(status, response.body or b"")
    if status in _FINAL_STATUS:
        return TransportClosedError(_FINAL_STATUS[status], f"HTTP {status}", rejection)
    if status in _PASSING_STATUS:
        wait = response.headers.get("Retry-After", "")
        # The header has whole seconds, the same for many clients, so a random fraction spreads them.
        part = random.randrange(1000)  # noqa: S311 (spreads load)
        hint = f"; retry={int(wait) * 1000 + part}" if wait.isdigit() and len(wait) < 5 else ""
        return TransportClosedError(_PASSING_STATUS[status], f"HTTP {status}{hint}", rejection)
    return TransportClosedError(1006, f"HTTP {status}", rejection)
