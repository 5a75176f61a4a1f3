"""`Client`: one session with a server, over as many connections as needed."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Generator
from typing import Any, Final, Literal, NoReturn

from fastapi_ws_stabilizer.client.backoff import Backoff
from fastapi_ws_stabilizer.client.connection import ClientConnection, ConnectionLost, ConnectionOptions
from fastapi_ws_stabilizer.client.errors import ClientClosedError, NotStartedError, close_text
from fastapi_ws_stabilizer.client.events import ClientEvents, F, logger
from fastapi_ws_stabilizer.client.inbound import ANY
from fastapi_ws_stabilizer.client.options import check_not_negative, check_option_names, check_positive
from fastapi_ws_stabilizer.client.reconnect import ReconnectPolicy
from fastapi_ws_stabilizer.client.send_buffer import PendingMessage, SendBuffer
from fastapi_ws_stabilizer.client.session import ClientSession
from fastapi_ws_stabilizer.client.target import Provider, Target
from fastapi_ws_stabilizer.client.transport import Connect, default_connector, default_options
from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.errors import RequestTimeoutError
from fastapi_ws_stabilizer.tasks import TaskSet, wait_for_all
from fastapi_ws_stabilizer.wire.v1.frames import Message

State = Literal["idle", "connecting", "open", "waiting", "closed"]

STABLE_AFTER: Final = 5.0
"""Seconds after which an open connection resets the backoff."""

START_WARNING_DELAY: Final = 1.0
"""Seconds after the first message until a warning says that the client is not started."""


class Client:
    """Session with a server of this library, over as many connections as needed.

    ```python
    async with connect("wss://example.com/ws/ann") as client:
        await client.send({"text": "hello"}, event="chat")
        async for message in client:
            print(message.event, message.data)
    ```

    Each message that you pass to `send` arrives once and in order, or its future fails. Messages of the server arrive
    once and in order, or the client calls `on_gap`. A client belongs to the event loop in which it was created.

    Args:
        url: The URL, or a function that returns it. The client calls the function for each attempt.
        auth: Function that returns the credential for the first frame. The client calls it for each attempt, with
            `force=True` if the server has rejected the last credential.
        connect_timeout: Seconds for one attempt, from the URL to the server's welcome.
        max_buffered: Maximum number of messages that are unsent or unacknowledged.
        max_buffered_bytes: Maximum size of these messages in bytes.
        overflow: Policy for further messages: `"reject"` fails the new message, `"drop_oldest"` the oldest unsent one.
        replay_on_lost: Whether messages of a lost session are sent again in the new one, with idempotency keys.
        deflate: Whether frames are compressed if the server does not offer permessage-deflate. granian does not.
        min_delay: Minimum delay before each new attempt, in seconds.
        base_delay: Maximum of the first random delay, in seconds. It doubles with each failure.
        max_delay: Maximum of any random delay, in seconds.
        stable_after: Seconds after which an open connection resets the backoff.
        first_connect_timeout: Seconds after which the client closes with 4408 if it was never connected. Without it the
            client tries without a limit.
        flush_timeout: Seconds that `close` gives the server to accept queued messages.
        probe_timeout: Seconds that the server has to answer a probe.
        dial: Function that opens connections; by default it uses the `websockets` library.
        options: Options of `websockets.connect`: `ssl`, `additional_headers`, `proxy`, ... Invalid with `dial`.

    Raises:
        TypeError: An option does not exist, `url` is neither a string nor a function, or `auth` is no function.
        ValueError: An option has an invalid value.
        RuntimeError: No event loop runs.
        ImportError: The `websockets` library is not installed. The error says how to install it.
    """

    def __init__(
        self,
        url: str | Provider,
        *,
        auth: Callable[..., Any] | None = None,
        connect_timeout: float = 10.0,
        max_buffered: int = 1000,
        max_buffered_bytes: int = 1024 * 1024,
        overflow: Literal["reject", "drop_oldest"] = "reject",
        replay_on_lost: bool = False,
        deflate: bool = False,
        min_delay: float = 0.2,
        base_delay: float = 1.0,
        max_delay: float = 30.0,
        stable_after: float = STABLE_AFTER,
        first_connect_timeout: float | None = None,
        flush_timeout: float = 5.0,
        probe_timeout: float = 5.0,
        dial: Connect | None = None,
        **options: Any,
    ) -> None:
        if dial is None:
            check_option_names(options, _OPTIONS | default_options(), of="a client")
        else:
            check_option_names(options, _OPTIONS, of="a client with `dial`")
        check_positive(connect_timeout=connect_timeout, probe_timeout=probe_timeout)
        check_positive(max_buffered=max_buffered, max_buffered_bytes=max_buffered_bytes)
        check_not_negative(min_delay=min_delay, base_delay=base_delay, max_delay=max_delay)
        check_not_negative(stable_after=stable_after, flush_timeout=flush_timeout)
        if first_connect_timeout is not None:
            check_positive(first_connect_timeout=first_connect_timeout)
        if overflow not in ("reject", "drop_oldest"):
            raise ValueError(f"overflow must be 'reject' or 'drop_oldest', not {overflow!r}")
        self._target = Target(url, auth, dial or default_connector(options))
        try:
            self._loop = asyncio.get_running_loop()
        except RuntimeError:
            raise RuntimeError(
                "a client needs a running event loop: call connect() in an `async def` that asyncio.run() runs"
            ) from None
        self._tasks = TaskSet(self._task_failed)
        self._events = ClientEvents(self._tasks)
        buffer = SendBuffer(max_buffered, max_buffered_bytes, overflow)
        self._session = ClientSession(self._tasks, self._events, buffer, replays=replay_on_lost)
        self._connection: ClientConnection | None = None
        self._connection_options = ConnectionOptions(connect_timeout, stable_after, probe_timeout, deflate)
        backoff = Backoff(base_delay, max_delay, min_delay)
        self._reconnects = ReconnectPolicy(backoff, can_reauthenticate=self._target.can_reauthenticate)
        self._first_connect_timeout = first_connect_timeout
        self._first_timer: asyncio.TimerHandle | None = None
        self._flush_timeout = flush_timeout
        self._ids = itertools.count(1)
        self._keys = f"{secrets.token_hex(6)}-" if replay_on_lost else None  # prefix of this client's idempotency keys
        self._state: State = "idle"
        self._runner: asyncio.Task[None] | None = None
        self._wakeup: asyncio.Future[None] = self._loop.create_future()
        self._close_error: ClientClosedError | None = None
        self._failed_attempts = 0
        self._last_failure: ConnectionLost | None = None
        self._warns_unstarted = False

    def __repr__(self) -> str:
        return f"<Client {self._state} session={self.session}>"

    # ── lifecycle ──

    @property
    def state(self) -> State:
        """State: `idle`, `connecting`, `open`, `waiting` (for the next attempt) or `closed` (permanently)."""
        return self._state

    @property
    def rtt(self) -> float | None:
        """Last measured round trip in seconds; `None` before the first measurement."""
        return None if self._connection is None else self._connection.rtt

    @property
    def session(self) -> str | None:
        """Id of the session; `None` before the first connection."""
        return self._session.id

    @property
    def attempts(self) -> int:
        """Number of opened connections, including those that the server closed before its welcome."""
        return self._session.attempts

    @property
    def closed(self) -> ClientClosedError | None:
        """Error with the final `code` and `reason`; `None` until the client is permanently closed."""
        return self._close_error

    @property
    def unreadable_frames(self) -> int:
        """Number of frames of the server that the client has skipped because it could not read them."""
        return self._session.unreadable_frames

    def start(self) -> Client:
        """Start to connect, and return without waiting for the connection.

        Raises:
            ClientClosedError: The client is closed. Create a new one.
        """
        if self._close_error is not None:
            raise self._close_error
        if self._runner is None:
            self._runner = self._tasks.spawn(self._run(), name="ws-client")
            if self._first_connect_timeout is not None:
                self._first_timer = self._loop.call_later(self._first_connect_timeout, self._never_connected)
        return self

    def _check_started(self) -> None:
        if self._runner is None and self._close_error is None:
            raise NotStartedError

    def __await__(self) -> Generator[Any, None, NoReturn]:
        """Raise an error that explains how to use a client, because a client is not awaitable."""
        raise TypeError(f"a client cannot be awaited: {_HOW_TO_USE}")

    def __enter__(self) -> NoReturn:
        """Raise an error that explains how to use a client, because it needs `async with`."""
        raise TypeError(f"a client needs `async with`: {_HOW_TO_USE}")

    def __exit__(self, *_: object) -> None:
        """Do nothing: `__enter__` raises, so Python never calls it."""

    def __iter__(self) -> NoReturn:
        """Raise an error that explains how to use a client, because it needs `async for`."""
        raise TypeError("a client needs `async for message in client:`")

    async def __aenter__(self) -> Client:
        """Connect, and return when the first connection is open.

        If that fails or is cancelled, the client is closed.

        Raises:
            ClientClosedError: The server's answer is final, or the URL or an option is invalid.
        """
        try:
            self.start()
            await self.wait_open()
        except BaseException:  # Python does not call `__aexit__` in this case
            self._finish(ClientClosedError(1000), is_ours=True)
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def wait_open(self) -> None:
        """Wait until a connection is open. Cancelling is safe.

        Raises:
            ClientClosedError: The client is closed.
            NotStartedError: The client is not started.
        """
        self._check_started()
        opened: asyncio.Future[None] = self._loop.create_future()

        def look(*_: object) -> None:
            if self._state in ("open", "closed") and not opened.done():
                opened.set_result(None)

        self._events.add("state", look)
        try:
            look()
            await opened
        finally:
            self._events.remove("state", look)
        if self._close_error is not None:
            raise self._close_error

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Send queued messages, close the connection and end the session.

        The server has `flush_timeout` seconds to accept earlier messages. The others fail, and a warning in the log
        counts them. Cancelling closes the client without waiting. Further calls have no effect.

        Args:
            code: Close code.
            reason: Close reason.
        """
        runner = self._runner
        try:
            if self._close_error is None and runner is not None:
                await self._flush()
            self._finish(ClientClosedError(code, reason), is_ours=True)
            if runner is not None and runner is not asyncio.current_task():
                await wait_for_all([runner], 10.0)
        finally:  # also if `close` is cancelled
            self._finish(ClientClosedError(code, reason), is_ours=True)
            left = self._tasks.cancel()
        await wait_for_all(left, 1.0)

    async def _flush(self) -> None:
        deadline = monotonic() + self._flush_timeout
        # Acknowledgements come after messages that your code may no longer read.
        self._session.inbound.stop_blocking()
        await wait_for_all(self._session.buffer.unaccepted_futures(), self._flush_timeout)
        if self._connection is not None:  # volatile messages are written but not acknowledged
            await self._connection.flush(max(0.0, deadline - monotonic()))

    def reconnect(self) -> None:
        """Drop the connection or stop waiting, and reconnect now. The session continues."""
        self._reconnects.reset_backoff()
        if self._connection is not None:
            self._connection.mark_lost(4000, "reconnect", at_once=True)
        self._reconnect_now()

    def probe(self) -> None:
        """Check the connection, for example after a change of the network.

        If the server does not answer soon, the client reconnects. While the client waits for the next attempt, it
        starts the attempt now.
        """
        if self._connection is not None:
            self._connection.probe()
        self._reconnect_now()

    def _reconnect_now(self) -> None:
        if not self._wakeup.done():
            self._wakeup.set_result(None)

    # ── sending ──

    def send(self, data: Any, *, event: str | None = None, key: str | None = None) -> asyncio.Future[None]:
        """Queue a message. Await the returned future to know that the server has accepted it.

        Awaiting is optional. A client that is not started queues the message until it is. Awaiting the future does not
        start the client, and a warning in the log says so after a second.

        Args:
            data: Data that can be encoded as JSON, or bytes.
            event: The event of the message.
            key: Idempotency key. The server does not handle a message if it has handled one with the same key.

        Returns:
            A future. It fails with a `ClientError` if it is unknown whether the server has accepted the message, and
            with a `RefusedError` if the server rejects it. If the server rejects it after accepting it, the client
            calls `on_error` instead.

        Raises:
            ClientClosedError: The client is closed.
            BufferFullError: The send buffer is full.
            MessageTooLargeError: The message is larger than the server accepts.
            ValueError: The data cannot be encoded as JSON.
        """
        return self._queue(data, event=event, key=key or self._new_key()).done

    def send_volatile(self, data: Any, *, event: str | None = None) -> bool:
        """Send a message only if it can be sent now; return `False` otherwise.

        The message is not buffered, and the server does not acknowledge it.

        Raises:
            MessageTooLargeError: The message is larger than the server accepts.
            ValueError: The data cannot be encoded as JSON.
        """
        connection = self._connection
        return connection is not None and connection.send_volatile(data, event)

    async def request(self, event: str, data: Any = None, *, timeout: float = 10.0, key: str | None = None) -> Any:
        """Send a message to a handler of the server, and return the handler's result.

        The request survives a reconnect. Cancelling withdraws it if it was not sent yet.

        Raises:
            RequestError: The server answered with an error.
            RequestTimeoutError: The server did not answer in time.
            ClientClosedError: The client is closed.
            SessionLostError: The session was lost, and it is unknown whether the server has handled the request.
            BufferFullError: The send buffer is full.
            NotStartedError: The client is not started.
        """
        self._check_started()
        request_id = f"c{next(self._ids)}"
        message = self._queue(data, event=event, id=request_id, key=key or self._new_key())
        future = self._session.requests.open(request_id, message)
        try:
            if await wait_for_all([future], timeout):
                return future.result()
        finally:
            self._session.requests.forget(request_id)
            self._session.buffer.cancel(message)
        raise RequestTimeoutError(timeout)

    def _queue(self, data: Any, **fields: Any) -> PendingMessage:
        if self._close_error is not None:
            raise self._close_error
        message = PendingMessage("msg", data, fields)
        self._session.buffer.add(message)
        if self._runner is None and not self._warns_unstarted:
            self._warns_unstarted = True
            self._loop.call_later(START_WARNING_DELAY, self._warn_unstarted)
        return message

    def _warn_unstarted(self) -> None:
        if self._runner is None and self._close_error is None:
            logger.warning("messages are queued but not sent: %s", NotStartedError())

    def _new_key(self) -> str | None:
        return None if self._keys is None else f"{self._keys}{next(self._ids)}"

    # ── receiving ──

    def on(self, event: str = ANY) -> Callable[[F], F]:
        """Register a handler for an event, as the decorator `@client.on("chat")`.

        The client calls it with the data of each message. Handlers run one after the other, in the order of the
        messages. The return value answers the server if the message was a request. A handler that awaits `request`
        delays the handlers after it. While 1,024 messages wait, the client stops reading, and receives no answers
        either. Start a task for such work. Without an event the handler gets every event that has no handler of its
        own.
        """

        def register(handler: F) -> F:
            self._session.inbound.on(event, handler)
            return handler

        return register

    def __aiter__(self) -> AsyncIterator[Message]:
        """Iterate over the messages without a handler, until the client is closed.

        The loop ends after your own `close()`. It raises `ClientClosedError` if the client closes for another reason.

        A slow loop delays everything after the 1,024 messages that wait for it. Ten seconds after your code has left a
        loop, waiting messages no longer delay handlers and answers. The client then discards the oldest waiting
        messages until your code iterates again.
        """
        self._check_started()
        return self._session.inbound.loop()

    async def __anext__(self) -> Message:
        self._check_started()
        message = await self._session.inbound.get()
        if message is None:
            raise StopAsyncIteration
        return message

    # ── listeners ──

    def on_open(self, listener: F) -> F:
        """Call `listener(outcome)` when a connection opens: `none`, `full`, `gap` or `lost`."""
        return self._events.add("open", listener)

    def on_gap(self, listener: F) -> F:
        """Call `listener(gap)` when messages of the server were missed, with a `Gap`."""
        return self._events.add("gap", listener)

    def on_close(self, listener: F) -> F:
        """Call `listener(code, reason)` when a connection ends or an attempt fails."""
        return self._events.add("close", listener)

    def on_state(self, listener: F) -> F:
        """Call `listener(state)` when the state changes."""
        return self._events.add("state", listener)

    def on_drain(self, listener: F) -> F:
        """Call `listener(after, within)`, in seconds, when the server drains.

        The client reconnects automatically.
        """
        return self._events.add("drain", listener)

    def on_error(self, listener: F) -> F:
        """Call `listener(error)` on an error that does not end the connection."""
        return self._events.add("error", listener)

    # ── connecting ──

    async def _run(self) -> None:
        try:
            while self._close_error is None:
                self._set_state("connecting")
                lost = await self._run_connection()
                if self._close_error is not None:
                    break
                self._events.emit("close", lost.code, lost.reason)
                if lost.code == 4429:
                    self._session.buffer.reduce_window()
                delay = self._reconnects.next_delay(lost)
                if self._reconnects.abandons_session:
                    self._session.token = None
                if delay is None:
                    self._finish(ClientClosedError(lost.code, lost.reason, lost.rejection))
                    break
                if self._close_error is not None:  # a listener has closed the client
                    break
                self._log_lost(lost, delay)
                self._set_state("waiting")
                self._wakeup = self._loop.create_future()
                if delay > 0:
                    await wait_for_all([self._wakeup], delay)
        finally:
            self._finish(self._close_error or ClientClosedError(1006, "cancelled"))

    async def _run_connection(self) -> ConnectionLost:
        connection = ClientConnection(self._session, self._target, self._tasks, self._connection_options)
        self._connection = connection
        try:
            welcome = await connection.open(renews_credential=self._reconnects.is_credential_rejected)
            if welcome is not None:
                self._on_connected(self._session.attach(welcome))
                await connection.serve()
        finally:
            lost = await connection.close()
            self._connection = None
        return lost

    def _on_connected(self, outcome: str) -> None:
        if self._first_timer is not None:
            self._first_timer.cancel()
        if self._failed_attempts:
            logger.info("connected to %s after %d failed attempts", self._target, self._failed_attempts)
            self._failed_attempts = 0
        self._set_state("open")
        self._events.emit("open", outcome)

    def _set_state(self, state: State) -> None:
        if state != self._state:
            self._state = state
            self._events.emit("state", state)

    def _log_lost(self, lost: ConnectionLost, delay: float) -> None:
        """Log a lost connection or a failed attempt. The first of several failures is a warning."""
        cause = close_text(lost.code, lost.reason, lost.rejection)
        if lost.was_open:
            logger.info("the connection to %s is lost: %s; next attempt in %.1f s", self._target, cause, delay)
            return
        self._failed_attempts += 1
        self._last_failure = lost
        level = logging.WARNING if self._failed_attempts == 1 else logging.INFO
        logger.log(level, "cannot connect to %s: %s; next attempt in %.1f s", self._target, cause, delay)

    def _never_connected(self) -> None:
        reason, last = f"no connection within {self._first_connect_timeout:g} s", self._last_failure
        if last is not None:
            reason = f"{reason}; last attempt: {close_text(last.code, last.reason)}"
        self._finish(ClientClosedError(4408, reason, None if last is None else last.rejection))

    def _finish(self, error: ClientClosedError, *, is_ours: bool = False) -> None:
        if self._close_error is not None:
            return
        self._close_error = error
        if self._first_timer is not None:
            self._first_timer.cancel()
        if not is_ours:
            cause = close_text(error.code, error.reason, error.rejection)
            logger.warning("the client of %s is permanently closed: %s", self._target, cause)
        if left := sum(not done.done() for done in self._session.buffer.unaccepted_futures()):
            logger.warning("the client is closed, but the server has not accepted %d messages", left)
        if self._connection is not None:
            self._connection.mark_lost(error.code if error.code in (1000, 4000) else 1000, error.reason)
        self._reconnect_now()
        self._session.close(error, is_ours=is_ours)
        self._set_state("closed")

    def _task_failed(self, task: asyncio.Task[Any], error: BaseException) -> None:
        logger.error("%s failed", task.get_name(), exc_info=error)
        if task is self._runner:
            self._finish(ClientClosedError(1006, f"a bug in the client: {error!r}"))


_HOW_TO_USE: Final = "write `async with connect(url) as client:`, or `client = connect(url).start()`"

_OPTIONS: Final = frozenset(inspect.signature(Client).parameters) - {"url", "options"}
"""Names of the options that are not passed on."""


def connect(url: str | Provider, **options: Any) -> Client:
    """Create a client for `async with`. The arguments are those of `Client`."""
    return Client(url, **options)
