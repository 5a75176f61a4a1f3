"""The two ASGI callables of a connection: the server's transport behind them, and the ones that replace them.

ASGI cannot abort a connection and does not report reliably how it was lost. Both are possible if `receive` or `send` is
a method of the server's protocol object and no middleware wraps it. Otherwise everything here returns "unknown". The
rest of the package works without it, so each access is guarded.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from fastapi_ws_stabilizer.close_codes import SERVER_CODES, DisconnectReason, local_close
from fastapi_ws_stabilizer.compat.starlette import close_frame_was_received, forget_task, transport_of, unwrap_send
from fastapi_ws_stabilizer.compat.uvicorn import PUSHING_CLASS, can_push_events, start_keepalive, stop_keepalive
from fastapi_ws_stabilizer.connection.inbox import InboxClosed
from fastapi_ws_stabilizer.net.tcp import (
    HAS_UNSENT_LOW_WATER,
    kernel_unacked_bytes,
    limit_buffers,
    seconds_since_received,
    send_progress,
    unacked_bytes,
    unflushed_bytes,
)
from fastapi_ws_stabilizer.servers.direct import EXTENSION, DirectTransport
from fastapi_ws_stabilizer.wire.encoded import CLOSE, encode

if TYPE_CHECKING:
    from fastapi_ws_stabilizer.connection.connection import Connection
    from fastapi_ws_stabilizer.connection.ended_connection import EndedConnection

_SERVERS: Final = ("uvicorn.", "hypercorn.", "fastapi_ws_stabilizer.servers.")
"""Modules of the servers whose `send` needs no task of its own."""

FLUSH_GRACE: Final = 1.0
"""Seconds that a transport has to flush its buffer for a client that left or is dead, before it is aborted."""

CLOSE_HANDSHAKE_TIMEOUT: Final = 3.0
"""Seconds that a client has to answer a close frame: 1.5 round trips of a bad mobile link. Servers wait for 5 to 20 s,
and a client that does not answer would hold its connection for that long."""


class ServerTransport:
    """Server side of one connection behind its ASGI callables."""

    __slots__ = ("_receiver", "_sender", "send")

    def __init__(self, receive: object, send: object) -> None:
        self._receiver: Any = getattr(receive, "__self__", None)
        direct = unwrap_send(send, only_starlettes=True)
        self._sender: Any = getattr(direct, "__self__", None)
        if self._sender is None:  # a middleware wraps it, so it is not called directly
            self._sender = getattr(unwrap_send(direct), "__self__", None)
            direct = send
        self.send: Any = direct

    @property
    def is_direct(self) -> bool:
        """Whether `send` is the server's own coroutine function, which does not depend on its task."""
        owner = getattr(self.send, "__self__", None)
        return type(owner).__module__.startswith(_SERVERS) and _is_coroutine_method(self.send.__func__)

    def direct_transport(self, scope: Mapping[str, Any]) -> DirectTransport | None:
        """Return the server's direct transport; `None` if it has none, it is in use, or middleware wraps it."""
        owner: Any = getattr(self.send, "__self__", None)
        if EXTENSION not in (scope.get("extensions") or ()) or owner is None or owner is not self._receiver:
            return None
        if owner.in_use:
            return None
        return owner  # type: ignore[no-any-return]

    @property
    def pushing_protocol(self) -> Any:
        """The server's protocol object, if it can pass on its events and no middleware wraps `receive`; else `None`."""
        receiver = self._receiver
        pushes = type(receiver).__name__ == PUSHING_CLASS and can_push_events(receiver)
        return receiver if pushes else None

    @property
    def peer(self) -> str | None:
        """Address of the transport's peer, empty for a Unix socket; `None` where it is unknown.

        The scope's `client` can differ, because uvicorn takes it from X-Forwarded-For.
        """
        ask = getattr(transport_of(self._receiver, self._sender), "get_extra_info", None)
        try:
            name = ask("peername") if callable(ask) else None
        except Exception:  # a closed transport may raise
            return None
        if isinstance(name, (str, bytes)):
            return ""
        return str(name[0]) if isinstance(name, tuple) and name else None

    def limit_buffers(self, unsent_low_water: int | None, write_buffer_high_water: int) -> None:
        """Limit what the kernel and the server hold for a slow client. No effect without access to the transport."""
        transport = transport_of(self._receiver, self._sender)
        if transport is not None:
            limit_buffers(transport, unsent_low_water, write_buffer_high_water)

    @property
    def unlimited_buffers(self) -> frozenset[str]:
        """Names of the options that set the arguments of `limit_buffers` and have no effect here."""
        if not self.can_abort:
            return frozenset({"unsent_low_water_bytes", "write_buffer_high_water_bytes"})
        return frozenset() if HAS_UNSENT_LOW_WATER else frozenset({"unsent_low_water_bytes"})

    @property
    def can_abort(self) -> bool:
        """Whether the transport is accessible."""
        return transport_of(self._receiver, self._sender) is not None

    @property
    def closing(self) -> bool:
        """Whether the server is closing the transport."""
        closing = getattr(transport_of(self._receiver, self._sender), "is_closing", None)
        return callable(closing) and bool(closing())

    def abort(self) -> bool:
        """Abort the connection without waiting. Return `False` if the transport is not accessible or raises."""
        transport = transport_of(self._receiver, self._sender)
        if transport is None:
            return False
        try:
            transport.abort()
        except Exception:  # a foreign object; after any error the connection counts as closed
            return False
        return True

    def abort_unless_flushed(self, linger: float | None = None, max_linger: float = 0.0) -> None:
        """Abort the connection if its buffer is not empty after `linger` seconds.

        A closing transport waits until its buffer is empty. A client that reads nothing prevents that without a time
        limit, and uvicorn waits for its transports before it exits.

        Args:
            linger: Seconds without progress before the abort; `FLUSH_GRACE` if omitted.
            max_linger: Maximum seconds in total for a client that accepts bytes.
        """
        if self.unflushed_bytes:
            delay = FLUSH_GRACE if linger is None else linger
            asyncio.get_running_loop().call_later(
                delay,
                self._abort_if_unflushed,
                delay,
                max_linger - delay,
                self.progress(),
                context=contextvars.Context(),
            )

    def _abort_if_unflushed(self, linger: float, left: float, before: int | None) -> None:
        if not self.unflushed_bytes:
            return
        progress = self.progress()
        if left > 0 and before is not None and progress is not None and progress > before:
            delay = min(linger, left)
            asyncio.get_running_loop().call_later(delay, self._abort_if_unflushed, linger, left - delay, progress)
        else:
            self.abort()

    def abort_unless_answered(self, *, taken: bool = True) -> None:
        """Abort the connection if the client has not answered the close frame after `CLOSE_HANDSHAKE_TIMEOUT` seconds.

        Args:
            taken: Whether to abort only if the client is known to have received all earlier bytes. A slow client then
                has the time that the server allows.
        """
        if self.can_abort and not self.closing:
            asyncio.get_running_loop().call_later(
                CLOSE_HANDSHAKE_TIMEOUT, self._abort_if_unanswered, taken, context=contextvars.Context()
            )

    def _abort_if_unanswered(self, taken: bool) -> None:
        if not self.closing and not (taken and (self.unflushed_bytes != 0 or self._untaken_bytes() != 0)):
            self.abort()

    def _untaken_bytes(self) -> int | None:
        """Return the bytes not acknowledged by the client's TCP stack; `None` if the system does not report them."""
        return kernel_unacked_bytes(transport_of(self._receiver, self._sender))

    def stop_keepalive(self) -> None:
        """Stop the server's own pings, because nothing reads their pongs."""
        stop_keepalive(self._receiver, self._sender)

    def start_keepalive(self) -> None:
        """Send the server's own pings again."""
        start_keepalive(self._receiver, self._sender)

    def forget_task(self, task: asyncio.Task[Any] | None) -> None:
        """Remove a task that does not end from the server's tasks, because uvicorn would wait for it at shutdown."""
        forget_task(task, self._receiver, self._sender)

    @property
    def unflushed_bytes(self) -> int | None:
        """Bytes in the transport's buffer; `None` where they cannot be measured."""
        transport = transport_of(self._receiver, self._sender)
        return None if transport is None else unflushed_bytes(transport)

    def progress(self) -> int | None:
        """Return a number that grows when the client's TCP stack accepts bytes; `None` if it cannot be measured."""
        return send_progress(transport_of(self._receiver, self._sender))

    def unsent_bytes(self) -> int | None:
        """Return the bytes that were written but not acknowledged by the client's TCP stack; `None` if unknown."""
        return unacked_bytes(transport_of(self._receiver, self._sender))

    def seconds_since_received(self) -> float | None:
        """Return the seconds since bytes last arrived from the client; `None` where this cannot be measured."""
        return seconds_since_received(transport_of(self._receiver, self._sender))

    def saw_close_frame(self, event: Mapping[str, Any]) -> bool:
        """Return whether a `websocket.disconnect` event follows a close frame of the client.

        uvicorn reports 1005 both for a lost network and for a close frame without a code. hypercorn reports 1006 for
        everything. The state of their protocol objects shows the difference. If they are not accessible, the event
        decides. A code other than 1005, 1006 and the servers' own codes comes from a close frame. So does 1005 with a
        reason, because a lost connection has none.
        """
        received = close_frame_was_received(self._receiver, self._sender)
        if received is not None:
            return received
        code = event.get("code") or 1005
        return code not in {1005, 1006, *SERVER_CODES} or (code == 1005 and event.get("reason") is not None)


@functools.lru_cache(maxsize=16)
def _is_coroutine_method(function: Any) -> bool:
    """Return whether a method of a server is a coroutine function. Each connection asks, for the same few methods."""
    return inspect.iscoroutinefunction(function)


class AsgiShim:
    """The `receive` and `send` that a connection installs in its `WebSocket`.

    Code that uses the `WebSocket` directly therefore goes through the inbox and the outbox too.

    Args:
        connection: The connection.
    """

    __slots__ = ("_connection",)

    def __init__(self, connection: Connection) -> None:
        self._connection: Connection | EndedConnection = connection

    @property
    def client_id(self) -> str:
        """Client id of the connection."""
        return self._connection.client_id

    def release(self, ended: EndedConnection) -> None:
        """Drop the connection after its end, so that a `WebSocket` in user code does not hold it."""
        self._connection = ended

    async def receive(self) -> dict[str, Any]:
        """Replace the server's `receive`. Cancelling is safe.

        Raises:
            ConcurrentReceiveError: Another task is receiving.
            WrongLoopError: This is not the event loop of the connection.
        """
        connection = self._connection
        connection.check_loop()
        try:
            item = await connection.inbox.get()
        except InboxClosed:
            await connection.yield_after_end()
            close_info = connection.close_info or local_close(DisconnectReason.NETWORK_LOST)
            return {"type": "websocket.disconnect", "code": close_info.code, "reason": close_info.reason}
        message = connection.read_raw(item)
        return {"type": "websocket.receive", "text" if isinstance(message, str) else "bytes": message}

    async def send(self, message: Any) -> None:
        """Replace the server's `send`. If it is cancelled while it waits for room, nothing is sent.

        Raises:
            SocketClosed: The connection is closed.
            WrongLoopError: This is not the event loop of the connection.
        """
        connection = self._connection
        if message["type"] == CLOSE:
            reason = message.get("reason") or ""
            connection.close(DisconnectReason.APPLICATION, code=message.get("code", 1000), reason=reason)
            return
        if message["type"] != "websocket.send":
            raise RuntimeError(f"an accepted WebSocket cannot send {message['type']!r}")
        data = message.get("bytes")
        await connection.send(encode(message.get("text") or "" if data is None else data))

    async def yield_after_end(self) -> None:
        """Count an error for a closed connection, and yield to the event loop from the second one on."""
        await self._connection.yield_after_end()
