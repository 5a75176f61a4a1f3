"""Connections of the `websockets` library."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any, Final

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidURI

from fastapi_ws_stabilizer.client.errors import ClientClosedError
from fastapi_ws_stabilizer.client.transport import Connect, Transport, TransportClosedError, UnreadableMessageError
from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.net.tcp import progress
from fastapi_ws_stabilizer.wire.v1.frames import MAX_SENT_BYTES

INVALID_TARGET: Final = 4400
"""Stands for a URL or options with which no dial can succeed, however often it is tried."""


LINGER: Final = 0.5
"""Seconds that a server which has sent its close frame has to close the network connection. The library waits until
then, and hypercorn does not close it while messages come in."""


class CountingConnection(ClientConnection):
    """A connection of the library that counts what comes in, be it only a part of a message.

    Attributes:
        received_bytes: Bytes that have come in so far.
        received_at: When the last of them came, on the monotonic clock.
    """

    received_bytes = 0
    received_at = 0.0
    _leaves = False

    def data_received(self, data: bytes) -> None:
        """As asyncio calls it."""
        self.received_bytes += len(data)
        self.received_at = monotonic()
        super().data_received(data)
        if self.protocol.close_rcvd is not None and not self._leaves:
            self._leaves = True
            self.loop.call_later(LINGER, self.transport.close)


class WebSocketsTransport:
    """A connection of the `websockets` library."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    @property
    def subprotocol(self) -> str | None:
        """What the server has chosen."""
        chosen: str | None = self._connection.subprotocol
        return chosen

    @property
    def compresses(self) -> bool:
        """As `Transport`."""
        return bool(self._connection.protocol.extensions)

    async def send(self, message: str | bytes) -> None:
        """As `Transport`."""
        try:
            await self._connection.send(message)
        except Exception as error:
            raise self._lost(error) from error

    async def receive(self) -> str | bytes:
        """As `Transport`."""
        try:
            message: str | bytes = await self._connection.recv()
        except Exception as error:
            raise self._lost(error) from error
        return message

    def received(self) -> tuple[int, float]:
        """As `Transport`. Nothing is known of a connection that the options have put in the place of ours."""
        connection = self._connection
        return getattr(connection, "received_bytes", 0), getattr(connection, "received_at", 0.0)

    def send_progress(self) -> int | None:
        """As `Transport`."""
        return progress(getattr(self._connection, "transport", None))

    async def close(self, code: int, reason: str) -> None:
        """As `Transport`."""
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
        if sent is not None and sent.code in (1002, 1007, 1009):  # the library itself refused what came in
            return UnreadableMessageError(f"closed with {sent.code} {sent.reason}".rstrip())
        return TransportClosedError(1006, str(error))


def connector(options: dict[str, Any]) -> Connect:
    """Dial with `options`, which are those of the library's `connect`.

    A dial raises `ClientClosedError` where the URL or the options themselves are wrong: dialling again would not help.
    """

    async def dial(url: str, subprotocols: Sequence[str]) -> Transport:
        try:
            connection = await connect(
                url,
                **{
                    "subprotocols": list(subprotocols),
                    "ping_interval": None,  # the protocol has its own
                    "open_timeout": None,
                    "close_timeout": 5,
                    "max_size": MAX_SENT_BYTES,
                    "create_connection": CountingConnection,
                    **options,
                },
            )
        except OSError as error:  # before ValueError: a certificate that is not valid, today, is both
            raise _refused(error) from error
        except (InvalidURI, TypeError, ValueError) as error:
            raise ClientClosedError(INVALID_TARGET, f"it cannot be dialled: {error}") from error
        except Exception as error:
            raise _refused(error) from error
        return WebSocketsTransport(connection)

    return dial


_FINAL_STATUS: Final = {401: 4401, 403: 4403, 404: 4404, 406: 4406}
_PASSING_STATUS: Final = {429: 4429, 503: 4503}


def _refused(error: Exception) -> TransportClosedError:
    """What a failed dial means, in close codes: here, unlike in a browser, the HTTP status can be seen."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if status in _FINAL_STATUS:
        return TransportClosedError(_FINAL_STATUS[status], f"HTTP {status}")
    if status in _PASSING_STATUS:
        wait = response.headers.get("Retry-After", "") if response is not None else ""
        # The header tells whole seconds, to many clients the same: the part of the second is chosen here.
        part = random.randrange(1000)  # noqa: S311 (spreads load)
        hint = f"; retry={int(wait) * 1000 + part}" if wait.isdigit() and len(wait) < 5 else ""
        return TransportClosedError(_PASSING_STATUS[status], f"HTTP {status}{hint}")
    return TransportClosedError(1006, f"HTTP {status}" if status else str(error) or repr(error))
