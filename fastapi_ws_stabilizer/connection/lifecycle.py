"""The life of one connection: NEW, OPEN, ENDING, ENDED, and nothing else.

Many things can end a connection at the same moment: the client, the network, the heartbeat, a stuck send, a newer
connection, the endpoint. The first one wins and writes the `Ending`; everyone who waits is woken at once; then one task
does the rest in order, each step with a limit in time:

1. what is queued is sent, if the ending says so, and the close frame after it (the outbox's writer does that);
2. who is dispatching messages finishes, then the disconnect hooks run;
3. the endpoint gets the rest of `disconnect_grace` and is cancelled then; tasks that are tied to the connection are
   cancelled when it has returned;
4. what the transport still holds gets a moment to be flushed, and is cut off then.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import secrets
from typing import Any, Final

from fastapi import WebSocket, WebSocketDisconnect

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.close_codes import DisconnectReason, Ending, ending
from fastapi_ws_stabilizer.config import CompressionMode, HeartbeatType
from fastapi_ws_stabilizer.connection.activity import Activity
from fastapi_ws_stabilizer.connection.endpoint import Endpoint, ending_for, is_bug
from fastapi_ws_stabilizer.connection.inbox import Inbox, InboxClosed
from fastapi_ws_stabilizer.connection.link_outbox import LinkOutbox
from fastapi_ws_stabilizer.connection.link_reader import LinkReader
from fastapi_ws_stabilizer.connection.parts import Parts
from fastapi_ws_stabilizer.connection.pump import pump
from fastapi_ws_stabilizer.connection.sending import SendingHalf
from fastapi_ws_stabilizer.connection.server_side import LINGER, ServerSide
from fastapi_ws_stabilizer.errors import NotOpenError, socket_closed
from fastapi_ws_stabilizer.hub.pulse import Pulse
from fastapi_ws_stabilizer.tasks import Latch, TaskSet, start, wait_for_all
from fastapi_ws_stabilizer.wire.payload import CLOSE, Frame, encode

_MAX_FLUSH: Final = 6
"""How many `send_timeout`s the flush of an outbox may take in all, as long as it makes progress."""


class Connection(SendingHalf):
    """One accepted WebSocket: its inbox, outbox, pulse, endpoint, and its end.

    It takes the place of the server's `receive` and `send` in the `WebSocket` it is made for, so that code which uses
    that object directly goes through the inbox and the outbox too.
    """

    __slots__ = (
        "_abort_timer",
        "_context",
        "_finished",
        "_pump",
        "_tied",
        "activity",
        "bad_messages",
        "control_frames",
        "endpoint",
        "hooks_wanted",
        "inbox",
        "opened",
        "opened_at",
        "told_of_pause",
        "websocket",
    )

    def __init__(
        self, websocket: WebSocket, client_id: str, parts: Parts, *, control_frames: bool, endpoint: Endpoint
    ) -> None:
        config = parts.config
        self.connection_id = secrets.token_hex(8)
        self.client_id = client_id
        self.websocket = websocket
        self.config = config
        self.reports = parts.reports
        self.control_frames = control_frames
        self.endpoint = endpoint
        self.opened_at = monotonic()
        self.pulse = Pulse(self.opened_at)
        self.inbox = Inbox(config.inbox_max_messages, config.inbox_max_bytes)
        self.server_side = ServerSide(websocket._receive, websocket._send)
        self.shard = parts.next_shard()
        self._link = self.server_side.link(websocket.scope)
        self.outbox = self._make_outbox(parts)
        self._over = Latch()
        self._finished = Latch()
        self.ending: Ending | None = None
        self.reading_paused = False
        self.told_of_pause = False
        self.hooks_wanted = False
        self.bad_messages = 0
        self.dropped_messages = 0
        self._parts = parts
        self.activity = Activity()
        self._tied: TaskSet | None = None
        self._context: contextvars.Context | None = None
        self._pump: asyncio.Task[None] | None = None
        self.opened = False
        self._abort_timer: asyncio.TimerHandle | None = None

    # ── open ──

    def before_accept(self) -> None:
        """Settle what cannot be changed once the connection is accepted."""
        if self._link is not None and self.config.compression is CompressionMode.NONE:
            self._link.refuse_compression()

    def open(self) -> None:
        """Start to read. From here on every path leads to one ending and to `finished`."""
        websocket = self.websocket
        receive = websocket._receive
        websocket._receive = self._asgi_receive
        websocket._send = self._asgi_send
        self.opened = True
        self._context = contextvars.copy_context()
        self.endpoint.watch(websocket.scope)
        self.outbox.open()
        self.reports.totals.connections_opened += 1
        self.tell("connection_opened", logging.INFO)
        if isinstance(self.outbox, LinkOutbox) and self._link is not None:
            self._link.attach(
                LinkReader(self, self._link, self.outbox),
                max_message_bytes=self.config.max_message_size,
                own_pings=self.config.heartbeat_type is HeartbeatType.PING,
            )
            self.outbox.attached(compress=self.config.compression is CompressionMode.DEFLATE)
        else:
            name = f"ws-pump-{self.connection_id}"
            self._pump = start(pump(self, receive), name=name, context=self._context)

    async def bug(self, event: str, error: BaseException) -> None:
        """Report a bug in user code, once, and tell the error hooks, which get as long as a disconnect hook."""
        self.reports.bug(event, error, client_id=self.client_id, connection_id=self.connection_id)
        await self._parts.failed(self.face, error)

    # ── messages ──

    async def receive(self) -> str | bytes:
        """Wait for the next message.

        Raises:
            SocketClosed: The connection is over and everything has been read.
            ConcurrentReceiveError: Another task is receiving.
        """
        self.check_opened()
        try:
            return await self.inbox.get()
        except InboxClosed:
            raise self._closed_error() from None

    async def send(self, frame: Frame) -> None:
        """Queue a frame; wait while the outbox is full.

        Raises:
            SocketClosed: The connection is over.
        """
        if not await self.outbox.put_wait(frame):
            raise self._closed_error()

    def check_opened(self) -> None:
        """Raise unless the connection is open or has been.

        Raises:
            NotOpenError: It is not accepted yet.
        """
        if not self.opened:
            raise NotOpenError

    def check_open(self) -> None:
        """Raise unless the connection is open.

        Raises:
            SocketClosed: It is over.
            NotOpenError: It is not accepted yet.
        """
        if not self.opened or self.ending is not None:
            raise self._closed_error()

    def _closed_error(self) -> Exception:
        return NotOpenError() if self.ending is None else socket_closed(self.ending)

    async def _asgi_receive(self) -> dict[str, Any]:
        """Stand in for the server's `receive`, for code that reads from the `WebSocket` itself."""
        try:
            message = await self.inbox.get()
        except InboxClosed:
            how = self.ending or ending(DisconnectReason.NETWORK_LOST)
            return {"type": "websocket.disconnect", "code": how.code, "reason": how.text}
        return {"type": "websocket.receive", "text" if isinstance(message, str) else "bytes": message}

    async def _asgi_send(self, message: Any) -> None:
        """Stand in for the server's `send`, for code that writes to the `WebSocket` itself."""
        if message["type"] == CLOSE:
            self.end(DisconnectReason.APPLICATION, code=message.get("code", 1000), text=message.get("reason") or "")
            return
        if message["type"] != "websocket.send":
            raise RuntimeError(f"an accepted WebSocket cannot send {message['type']!r}")
        data = message.get("bytes")
        await self.send(encode(message.get("text") or "" if data is None else data))

    def belongs_to(self, parts: Parts) -> bool:
        """Whether this connection was opened with these parts, and not by another manager."""
        return self._parts is parts

    # ── the end ──

    def end(self, reason: DisconnectReason, *, code: int | None = None, text: str | None = None) -> bool:
        """End the connection from our side; `False` if it was ending already. Waits for nothing.

        Raises:
            ValueError: `code` cannot be sent.
        """
        if not self.opened:
            raise NotOpenError
        if self.ending is not None:
            return False  # before the code is looked at: Starlette hands 1005 and 1006 back to us
        return self._begin_end(ending(reason, code=code, text=text))

    def ended_by_peer(self, how: Ending) -> None:
        """The connection is gone: the client, the network or the server in front of us has ended it."""
        self._begin_end(how)

    def lost(self, error: BaseException) -> None:
        """The connection broke."""
        if self._begin_end(Ending(DisconnectReason.NETWORK_LOST, 1006, by_peer=True)):
            self.tell("connection_lost", logging.DEBUG, cause=repr(error))

    def _begin_end(self, how: Ending) -> bool:
        if self.ending is not None:
            return False
        self.ending = how
        self._parts.left(self)
        self.reports.totals.endings[how.reason] += 1
        self._discarded(self.inbox.close(discard=not how.rule.deliver))
        if how.by_peer:
            self._discarded(self.outbox.discard())
        else:
            self._stop_reading()
            self._discarded(self.outbox.finish(how.code, how.text, flush=how.rule.flush))
            # A send that is stuck ends the flush earlier; this bounds a client that reads a byte now and then.
            patience = _MAX_FLUSH * self.config.send_timeout if how.rule.flush else LINGER
            self._abort_timer = asyncio.get_running_loop().call_later(patience, self.abort)
        self.endpoint.watch(self.websocket.scope)
        self._over.set()
        turns = self._parts.turns
        turns.soon(turns.pending(self.shard), self)
        return True

    def take_turn(self) -> None:
        """Begin with the rest of the end. Called soon after it was decided, with those of others, shard by shard."""
        if self.ending is not None and not self._finished.is_set:
            end = self._finish(self.ending)
            self._parts.tasks.spawn(end, name=f"ws-end-{self.connection_id}", context=self._context)

    @property
    def finished(self) -> asyncio.Future[None]:
        """A future that is done when everything is done for this connection."""
        return self._finished.future

    @property
    def is_finished(self) -> bool:
        """Whether everything is done for this connection."""
        return self._finished.is_set

    async def wait_over(self) -> Ending:
        """Wait for the ending. Cancelling is safe."""
        while self.ending is None:
            await asyncio.shield(self._over.future)
        return self.ending

    async def _finish(self, how: Ending) -> None:
        grace = self.config.disconnect_grace
        until = monotonic() + grace
        try:
            if not await wait_for_all([self.activity.idle()], grace):
                self._cancel_endpoint()
                await wait_for_all([self.activity.idle()], min(grace, LINGER))
            async with self._parts.cleanups:
                await self.run_disconnect_hooks()
            if not await wait_for_all([self.endpoint.returned], max(0.0, until - monotonic())):
                self._cancel_endpoint()
            tied = self._tied.cancel() if self._tied is not None else []
            await wait_for_all([self.endpoint.returned, *tied], grace)
            await wait_for_all([self.outbox.done], _MAX_FLUSH * self.config.send_timeout)
        finally:
            self._close(how)

    async def run_disconnect_hooks(self) -> None:
        """Run the disconnect hooks, once, if the connect hooks have begun."""
        if self.hooks_wanted and self.ending is not None:
            self.hooks_wanted = False
            await self._parts.disconnected(self.face, self.ending.reason)

    def _cancel_endpoint(self) -> None:
        if not self.endpoint.has_ended:
            self.tell("endpoint_cancelled", logging.DEBUG, disconnect_grace=self.config.disconnect_grace)
            self.endpoint.cancel()

    def give_up(self) -> None:
        """Nothing more is done for this connection: let go whoever waits for its end."""
        self._close(self.ending or ending(DisconnectReason.SERVER_SHUTDOWN))

    def _close(self, how: Ending) -> None:
        if self._finished.is_set:
            return
        self._finished.set()
        self._parts.finished(self)
        if self._abort_timer is not None:
            self._abort_timer.cancel()
            self._abort_timer = None
        self._stop_reading()
        self._pump = self._context = None  # they know this connection, and would keep it until the next collection
        if self.endpoint.tracked:  # it has ended, so nobody will read any more
            self._discarded(self.inbox.close(discard=True))
        patient = how.rule.flush and how.reason is not DisconnectReason.SERVER_SHUTDOWN and not how.by_peer
        self.server_side.abort_unless_flushed(self.config.send_timeout if patient else None)
        self.tell(
            "connection_ended",
            logging.INFO,
            reason=how.reason.value,
            code=how.code,
            text=how.text,
            seconds=monotonic() - self.opened_at,
        )

    def _stop_reading(self) -> None:
        """Take back a `receive` that waits: granian sends no close frame while one does."""
        if self._pump is not None and self._pump is not asyncio.current_task():
            self._pump.cancel()

    # ── user code ──

    def tie(self, coroutine: Any, name: str | None) -> asyncio.Task[Any]:
        """Start a task that ends with this connection, and whose failure ends it as the endpoint's would."""
        try:
            self.check_open()
        except Exception:
            coroutine.close()
            raise
        if self._tied is None:
            self._tied = TaskSet(self._tied_failed)
        return self._tied.spawn(coroutine, name=name or f"ws-task-{self.connection_id}")

    def _tied_failed(self, _: asyncio.Task[Any], error: BaseException) -> None:
        if isinstance(error, WebSocketDisconnect):
            return
        if is_bug(error):
            self._parts.tasks.spawn(self.bug("tied_task_failed", error), name=f"ws-error-{self.connection_id}")
        how = ending_for(error)
        self.end(how.reason, code=how.code, text=how.text)
