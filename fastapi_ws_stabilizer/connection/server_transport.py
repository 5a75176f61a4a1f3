"""What can be found out about the server behind the two ASGI callables, guarded at every step.

ASGI has no way to abort a connection and no reliable word on how one was lost. Both can be had where `receive` or
`send` is a method of the server's protocol object and no middleware wraps it. Everything here answers "unknown"
otherwise, and everything works without it.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
from collections.abc import Mapping
from typing import Any, Final

from fastapi_ws_stabilizer.close_codes import SERVER_CODES
from fastapi_ws_stabilizer.compat.starlette import unwrap_send
from fastapi_ws_stabilizer.net.tcp import (
    progress,
    seconds_since_received,
    unacknowledged_bytes,
    unflushed_bytes,
    unsent_bytes,
)
from fastapi_ws_stabilizer.servers.direct import DirectTransport, has_direct_transport

FLUSH_GRACE: Final = 1.0
"""Seconds that a transport has to flush what it holds for a client that is gone or dead, before it is aborted."""

CLOSE_HANDSHAKE_TIMEOUT: Final = 3.0
"""Seconds that a client has to answer a close frame: a round trip of a bad mobile link, and half of it again. Servers
wait for 5 to 20, and whoever means to answer nothing would hold a connection as long."""


class ServerTransport:
    """The server's end of one connection."""

    __slots__ = ("_receiver", "_sender", "send")

    def __init__(self, receive: object, send: object) -> None:
        self._receiver: Any = getattr(receive, "__self__", None)
        self._sender: Any = getattr(unwrap_send(send), "__self__", None)
        direct = unwrap_send(send, only_starlettes=True)
        self.send: Any = direct if getattr(direct, "__self__", None) is not None else send

    @property
    def is_direct(self) -> bool:
        """Whether `send` is a coroutine function of the server's own, so that it does not ask which task it runs in."""
        owner = getattr(self.send, "__self__", None)
        return inspect.iscoroutinefunction(self.send) and type(owner).__module__.startswith(_SERVERS)

    def direct_transport(self, scope: Mapping[str, Any]) -> DirectTransport | None:
        """What the server offers beyond ASGI, if no middleware stands between."""
        owner: Any = getattr(self.send, "__self__", None)
        if not has_direct_transport(scope) or owner is None or owner is not self._receiver or owner.in_use:
            return None
        return owner  # type: ignore[no-any-return]

    @property
    def peer(self) -> str | None:
        """The address of the other end of the transport, empty for a Unix socket; `None` where it cannot be seen.

        What the scope calls `client` may be somebody else: uvicorn puts there whom X-Forwarded-For names.
        """
        ask = getattr(self._transport(), "get_extra_info", None)
        try:
            name = ask("peername") if callable(ask) else None
        except Exception:  # a transport that is gone may refuse the question
            return None
        if isinstance(name, (str, bytes)):
            return ""
        return str(name[0]) if isinstance(name, tuple) and name else None

    @property
    def can_abort(self) -> bool:
        """Whether the transport is within reach."""
        return self._transport() is not None

    @property
    def closing(self) -> bool:
        """Whether the server is closing the transport."""
        closing = getattr(self._transport(), "is_closing", None)
        return callable(closing) and bool(closing())

    def abort(self) -> bool:
        """Cut the connection without waiting for anything; `False` where the server hides its transport."""
        transport = self._transport()
        if transport is None:
            return False
        try:
            transport.abort()
        except Exception:  # not our object: whatever it raises, the connection is already over for us
            return False
        return True

    def abort_unless_flushed(self, linger: float | None = None, most: float = 0.0) -> None:
        """Cut the connection if it still holds bytes after `linger` seconds, `FLUSH_GRACE` when left out.

        A transport that closes waits for its buffer to empty, which a client that reads nothing prevents for ever, and
        uvicorn waits for its transports before it exits.

        Args:
            linger: Seconds in which nothing is taken before it is cut.
            most: Seconds in all for a client that takes something.
        """
        if self.unflushed_bytes:
            delay = FLUSH_GRACE if linger is None else linger
            asyncio.get_running_loop().call_later(
                delay, self._abort_if_unflushed, delay, most - delay, self.progress(), context=contextvars.Context()
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
        """Cut the connection if its client has not answered the close frame after `CLOSE_HANDSHAKE_TIMEOUT` seconds.

        Args:
            taken: Whether to leave it alone where it is not known to have taken all that was sent before. One that is
                slow has the time that the server gives it.
        """
        if self.can_abort and not self.closing:
            asyncio.get_running_loop().call_later(
                CLOSE_HANDSHAKE_TIMEOUT, self._abort_if_unanswered, taken, context=contextvars.Context()
            )

    def _abort_if_unanswered(self, taken: bool) -> None:
        if not self.closing and not (taken and (self.unflushed_bytes != 0 or self._untaken_bytes() != 0)):
            self.abort()

    def _untaken_bytes(self) -> int | None:
        """How much the client's machine has not acknowledged; `None` where the system does not say."""
        return unacknowledged_bytes(self._transport())

    def forget_task(self, task: asyncio.Task[Any] | None) -> None:
        """Let the server not wait for a task that does not end: uvicorn would wait for it before it stops."""
        for protocol in (self._receiver, self._sender):
            tasks = getattr(protocol, "tasks", None)
            if isinstance(tasks, set):
                tasks.discard(task)

    @property
    def unflushed_bytes(self) -> int | None:
        """How much the transport has not yet given to the network; `None` where it cannot be seen."""
        return unflushed_bytes(self._transport())

    def progress(self) -> int | None:
        """A number that has grown if the client's machine has taken bytes since; `None` where that cannot be seen."""
        return progress(self._transport())

    def unsent_bytes(self) -> int | None:
        """How much was written that the client's machine has not acknowledged; `None` where it cannot be seen."""
        return unsent_bytes(self._transport())

    def seconds_since_received(self) -> float | None:
        """Seconds since bytes last came from the client, whole message or not; `None` where it cannot be seen."""
        return seconds_since_received(self._transport())

    def _transport(self) -> Any:
        for protocol in (self._receiver, self._sender):  # a middleware may wrap one of them
            transport = getattr(protocol, "transport", None)
            if callable(getattr(transport, "abort", None)):
                return transport
        return None

    def saw_close_frame(self, event: Mapping[str, Any]) -> bool:
        """Whether the client ended the connection with a close frame, for a `websocket.disconnect` event.

        uvicorn reports 1005 for a lost network as well as for a close frame without a code, and hypercorn 1006 for
        everything. Their protocol objects know better. Where they cannot be seen: a code other than 1005 and 1006 came
        from a frame, and so did a 1005 with a reason, since a lost connection has none.
        """
        websockets_state = getattr(getattr(self._receiver, "conn", None), "close_rcvd", _UNKNOWN)
        if websockets_state is not _UNKNOWN:
            return websockets_state is not None
        for wsproto in (getattr(self._receiver, "conn", None), getattr(self._sender, "connection", None)):
            name = getattr(getattr(wsproto, "state", None), "name", None)
            if name in ("CLOSED", "REMOTE_CLOSING"):
                return True
            if name in ("OPEN", "LOCAL_CLOSING"):
                return False
        code = event.get("code") or 1005
        return code not in {1005, 1006, *SERVER_CODES} or (code == 1005 and event.get("reason") is not None)


_UNKNOWN: Final = object()

_SERVERS: Final = ("uvicorn.", "hypercorn.", "fastapi_ws_stabilizer.servers.")
