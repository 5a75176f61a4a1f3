"""uvicorn's own WebSocket classes: events passed on as they arrive, empty messages, and pings during a pause.

`WebSocketsSansIOProtocol` of uvicorn 0.35 to 0.41 sends a message only if its text or bytes are true. `EMPTY_TEXT` and
`EMPTY_BYTES` are. For other versions and servers they are like any other empty message.

uvicorn puts each received message into an `asyncio.Queue` and stops reading until the application has taken it. Behind
that queue a connection needs a task that always reads, and each message costs a switch to that task.
`PushedEvents` replaces the queue and passes each event on at once. uvicorn keeps reading. uvicorn parses a whole read
at once, so the receiver can hold the messages that are left of it.

Supported: `WebSocketsSansIOProtocol` of uvicorn 0.35 and newer, without middleware that wraps `receive`. Fallback, also
if an attribute or a method below is missing or has changed: the connection reads with a task, through ASGI.
`tests/unit/compat/test_pushed_events.py` runs on the lowest and on the newest version.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Mapping
from typing import Any, Final, Protocol

_MODULE: Final = "uvicorn.protocols.websockets.websockets_sansio_impl"
PUSHING_CLASS: Final = "WebSocketsSansIOProtocol"
"""Name of the class whose objects can pass on their events."""

_NAMES: Final = {
    "receive": {"queue", "get", "read_paused", "empty", "transport", "resume_reading"},
    "send_receive_event_to_app": {"queue", "put_nowait", "read_paused", "transport", "pause_reading"},
}
"""Methods that use the queue, and the names that they use for that."""


class _EmptyText(str):
    """Empty text that is true."""

    __slots__ = ()

    def __bool__(self) -> bool:
        return True


class _EmptyBytes(bytes):
    """Empty bytes that are true."""

    __slots__ = ()

    def __bool__(self) -> bool:
        return True


EMPTY_TEXT: Final = _EmptyText()
"""Text of an empty message, for `send`."""

EMPTY_BYTES: Final = _EmptyBytes()
"""Bytes of an empty message, for `send`."""


class EventReceiver(Protocol):
    """Receiver of the events of one connection. Its methods never wait and never raise."""

    def message_received(self, message: str | bytes) -> None:
        """Process a received message."""

    def connection_lost(self, event: Mapping[str, Any]) -> None:
        """Process the end of the connection; `event` is the ASGI `websocket.disconnect`."""


class PushedEvents:
    """Queue of a uvicorn protocol object that passes each event to a receiver, or holds messages until it has room."""

    __slots__ = ("_held", "_receiver", "_target")

    def __init__(self, receiver: EventReceiver) -> None:
        self._target: EventReceiver | None = receiver
        self._receiver: EventReceiver | None = receiver  # None while messages are held
        self._held: deque[Mapping[str, Any]] | None = None

    def put_nowait(self, event: Mapping[str, Any]) -> None:
        """Pass an event to the receiver. Hot path: uvicorn calls this for each message."""
        receiver = self._receiver
        if receiver is None:
            self._put_held(event)
        elif event["type"] == "websocket.receive":
            text = event.get("text")
            receiver.message_received(event["bytes"] if text is None else text)
        else:
            receiver.connection_lost(event)

    def hold(self) -> None:
        """Hold messages from now on."""
        self._receiver = None
        if self._held is None:
            self._held = deque()

    @property
    def holds_messages(self) -> bool:
        """Whether messages are held."""
        return bool(self._held)

    def release(self) -> bool:
        """Pass on the held messages until the receiver calls `hold` again. Return whether it wants more messages."""
        held = self._held
        if held is not None:
            self._receiver = self._target
            while held and self._receiver is not None:
                self.put_nowait(held.popleft())
            if self._receiver is not None:
                self._held = None
        return self._receiver is not None

    def _put_held(self, event: Mapping[str, Any]) -> None:
        """Hold a message. The end of the connection waits for no room: the held messages go before it."""
        held = self._held
        if held is None:
            return
        held.append(event)
        if event["type"] != "websocket.receive":
            self._held = None
            while held and self._target is not None:
                self._receiver = self._target
                self.put_nowait(held.popleft())

    def stop(self) -> None:
        """Ignore all further events."""
        self._receiver = self._target = self._held = None

    def empty(self) -> bool:
        """Return `True`: the queue never contains anything."""
        return True

    async def get(self) -> Any:
        """Raise, because no event ever arrives here."""
        raise RuntimeError("fastapi-ws-stabilizer reads this WebSocket: read from its StableSocket instead")


def can_push_events(protocol: Any) -> bool:
    """Return whether a server's protocol object can pass on its events.

    It cannot while a call of `receive` is running, which would then wait forever. Such a call waits for the queue, or
    its event has just arrived there. So a queue with an event counts as in use. asyncio has no public name for the
    waiters of a queue.
    """
    kind: type = type(protocol)
    if kind.__name__ != PUSHING_CLASS or kind.__module__ != _MODULE or not _is_known(kind):
        return False
    return protocol.queue.empty() and not getattr(protocol.queue, "_getters", True)


def push_events(protocol: Any, events: PushedEvents) -> None:
    """Pass on all events of a protocol object from now on.

    uvicorn stops reading after a message unless `read_paused` says that it has done so already. Therefore this sets
    `read_paused` and resumes reading. At the close, uvicorn resumes reading once more, which has no effect then.
    """
    protocol.queue = events
    protocol.request = protocol.response = None  # the handshake has ended, and nothing reads them again
    protocol.read_paused = True
    protocol.transport.resume_reading()


def stop_keepalive(*protocols: Any) -> None:
    """Send no pings of the server, and wait for no pong, until `start_keepalive` is called.

    Supported: the sans-I/O class of uvicorn 0.44 and newer, and the `wsproto` class of 0.46 and newer. Older ones send
    no pings. Fallback, as on the `websockets` class: the server closes with 1011 if it reads no pong in time.
    """
    for protocol in protocols:
        stop = getattr(protocol, "stop_keepalive", None)
        if callable(stop):
            stop()
            return


def start_keepalive(*protocols: Any) -> None:
    """Send pings of the server again. No effect if it does so already. Supported and fallback: as `stop_keepalive`."""
    for protocol in protocols:
        start = getattr(protocol, "start_keepalive", None)
        if callable(start):
            if getattr(protocol, "ping_timer", None) is None and getattr(protocol, "pong_timer", None) is None:
                start()
            return


@functools.cache
def _is_known(kind: type) -> bool:
    """Return whether a class uses its queue as this module expects."""
    methods = {name: getattr(getattr(kind, name, None), "__code__", None) for name in _NAMES}
    return all(code is not None and _NAMES[name] <= set(code.co_names) for name, code in methods.items())
