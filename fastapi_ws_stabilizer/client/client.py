"""`Evictable`: one session with a server, over as many connections as it takes."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import logging
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from typing import Any, Final, Literal, NoReturn

from fastapi_ws_stabilizer.client.backoff import Backoff
from fastapi_ws_stabilizer.client.connection import ClientConnection
from fastapi_ws_stabilizer.client.errors import (
    ClientClosedError,
    ClientError,
    MessageTooLargeError,
    NotStartedError,
    RefusedError,
    UnreadableFrameError,
)
from fastapi_ws_stabilizer.client.events import ClientEvents, F, logger
from fastapi_ws_stabilizer.client.inbound import ANY, InboundMessages
from fastapi_ws_stabilizer.client.owner import ConnectionLost, Gap
from fastapi_ws_stabilizer.client.reconnect import ReconnectPolicy
from fastapi_ws_stabilizer.client.requests import PendingRequests
from fastapi_ws_stabilizer.client.send_buffer import PendingMessage, SendBuffer
from fastapi_ws_stabilizer.client.transport import Connect, default_connector
from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.errors import RequestTimeoutError
from fastapi_ws_stabilizer.tasks import TaskSet, wait_for_all
from fastapi_ws_stabilizer.wire.v1.frames import Message

Provider = Callable[[], "str | Awaitable[str]"]
State = Literal["idle", "connecting", "open", "waiting", "closed"]

STABLE_AFTER: Final = 5.0
"""Seconds of an open connection after which earlier failures are forgotten."""

STARTED_WITHIN: Final = 1.0
"""Seconds after its first message within which a client is started, or a warning says that it is not."""

MAX_UNFINISHED: Final = 2
"""Connections that may be lost in the middle of the same message before it is given up. It is begun again each time."""


class Client(ClientEvents):
    """A session with a server of this library, for as long as it takes: connections come and go under it.

    ```python
    async with connect("wss://example.com/ws/ann") as client:
        await client.send({"text": "hello"}, event="chat")
        async for message in client:
            print(message.event, message.data)
    ```

    Everything that is sent with `send` arrives once and in order, or its future fails. What the server sends arrives
    once and in order, or `on_gap` is told. It belongs to the event loop in which it was made.

    Args:
        url: Where to connect: a URL, or a function that returns one, called for each dial.
        auth: Gives the credential that goes into the first frame: a function, called for each dial with
            `force=True` if the server has refused the last one.
        connect_timeout: Seconds for one dial, from the URL to the server's welcome.
        max_buffered: Most messages that wait to be sent or accepted.
        max_buffered_bytes: Most bytes of them.
        overflow: What happens when more are sent: `"reject"` fails the new one, `"drop_oldest"` the oldest unsent one.
        replay_on_lost: Whether messages of a lost session are sent again in the new one, with idempotency keys.
        deflate: Whether frames are compressed where the server offers no permessage-deflate, as granian does not.
        min_delay: Seconds before each new dial, at least.
        base_delay: Seconds of the first random delay at most; it doubles with each failure.
        max_delay: Seconds of a random delay at most.
        stable_after: Seconds of an open connection after which earlier failures are forgotten.
        first_connect_timeout: Seconds after which a client that was never connected is closed for good, with 4408; it
            tries for ever when left out.
        flush_timeout: Seconds that `close` gives the server to accept what is queued.
        probe_timeout: Seconds for an answer when the link is doubted.
        dial: Opens connections; by default the `websockets` library.
        options: For `websockets.connect`: `ssl`, `additional_headers`, `proxy`, ...
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
        if overflow not in ("reject", "drop_oldest"):
            raise ValueError(f"overflow is 'reject' or 'drop_oldest', not {overflow!r}")
        if not (isinstance(url, str) or callable(url)):
            raise TypeError(f"url is a text like 'wss://example.com/ws', or a function that returns one, not {url!r}")
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise RuntimeError(
                "a client is made inside a running event loop: call connect() in an `async def` that asyncio.run() runs"
            ) from None
        self._url = url
        self._auth = auth
        self._connect_timeout = connect_timeout
        self._replay = replay_on_lost
        self.deflate = deflate
        self._stable_after = stable_after
        self._first_connect_timeout = first_connect_timeout
        self._flush_timeout = flush_timeout
        self._first_timer: asyncio.TimerHandle | None = None
        self._failed_dials = 0
        self._last_failure = ""
        self.probe_timeout = probe_timeout
        self._dial = dial or default_connector(**options)
        self._redial = ReconnectPolicy(Backoff(base_delay, max_delay, min_delay), refreshes=auth is not None)
        self._tasks = TaskSet(self._task_failed)
        super().__init__(self._tasks)
        self.buffer: SendBuffer = SendBuffer(max_buffered, max_buffered_bytes, overflow)
        self._requests = PendingRequests()
        self.incoming: InboundMessages = InboundMessages(
            self._tasks, self._reply, lambda: bool(len(self._requests) or len(self.buffer))
        )
        self._ids = itertools.count(1)
        self._keys = f"{secrets.token_hex(6)}-"
        self._state: State = "idle"
        self._attempt: ClientConnection | None = None
        self._runner: asyncio.Task[None] | None = None
        self._wakeup: asyncio.Future[None] = loop.create_future()
        self._ending: ClientClosedError | None = None
        self._unreadable = self._refused = 0
        self._warns_unstarted = False
        # What the session is: it outlives each attempt.
        self.instance: str = secrets.token_hex(8)
        self.session: str | None = None
        self.token: str | None = None
        self.last: int = 0
        self.dials = 0
        self._unfinished = (0, 0)  # number of the message before one that broke off, and how often

    def __repr__(self) -> str:
        return f"<Client {self._state} session={self.session}>"

    # ── life ──

    @property
    def state(self) -> State:
        """`idle`, `connecting`, `open`, `waiting` (for the next dial) or `closed` (for good)."""
        return self._state

    @property
    def rtt(self) -> float | None:
        """Seconds of the last measured round trip; `None` before the first."""
        return None if self._attempt is None else self._attempt.rtt

    @property
    def closed(self) -> ClientClosedError | None:
        """How it was closed for good, with its `code` and `reason`; `None` while it is not."""
        return self._ending

    @property
    def unreadable_frames(self) -> int:
        """How many frames of the server were left out, because they could not be read."""
        return self._unreadable

    def start(self) -> Client:
        """Begin to connect, without waiting for it.

        Raises:
            ClientClosedError: It was closed. Make another one.
        """
        if self._ending is not None:
            raise self._ending
        if self._runner is None:
            self._runner = self._tasks.spawn(self._run(), name="ws-client")
            if self._first_connect_timeout is not None:
                loop = asyncio.get_running_loop()
                self._first_timer = loop.call_later(self._first_connect_timeout, self._never_connected)
        return self

    def _never_connected(self) -> None:
        last = f"; the last dial: {self._last_failure}" if self._last_failure else ""
        self._finish(ClientClosedError(4408, f"no connection within {self._first_connect_timeout:g} s{last}"))

    def _check_started(self) -> None:
        if self._runner is None and self._ending is None:
            raise NotStartedError

    def __await__(self) -> Generator[Any, None, NoReturn]:
        """Say how a client is used: it is not awaited."""
        raise TypeError(f"a client cannot be awaited: {_HOW_TO_USE}")

    def __enter__(self) -> NoReturn:
        """Say how a client is used: its block is `async`."""
        raise TypeError(f"a client needs `async with`: {_HOW_TO_USE}")

    def __exit__(self, *_: object) -> None:
        """Never called: `__enter__` raises."""

    def __iter__(self) -> NoReturn:
        """Say how a client is used: its loop is `async`."""
        raise TypeError("a client needs `async for message in client:`")

    async def __aenter__(self) -> Client:
        """Connect; returns when the first connection is open. If that fails or is cancelled the client is closed.

        Raises:
            ClientClosedError: The server's answer was final, or the URL or an option is wrong.
        """
        try:
            self.start()
            await self.wait_open()
        except BaseException:  # nobody calls `__aexit__` then
            self._finish(ClientClosedError(1000), ours=True)
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def wait_open(self) -> None:
        """Wait until a connection is open. Cancelling is safe.

        Raises:
            ClientClosedError: There will be none.
            NotStartedError: It is not started.
        """
        self._check_started()
        opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def look(*_: object) -> None:
            if self._state in ("open", "closed") and not opened.done():
                opened.set_result(None)

        self._listen("state", look)
        try:
            look()
            await opened
        finally:
            self._stop_listening("state", look)
        if self._ending is not None:
            raise self._ending

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Send what is queued, and say goodbye: the session ends. Calling it again is quiet.

        The server has `flush_timeout` seconds to accept what was sent before. What it has not accepted then fails, and
        a warning in the log says how much that is. Cancelling says goodbye without waiting.
        """
        runner = self._runner
        try:
            if self._ending is None and runner is not None:
                await self._flush()
            self._finish(ClientClosedError(code, reason), ours=True)
            if runner is not None and runner is not asyncio.current_task():
                await wait_for_all([runner], 10.0)
        finally:  # also if the goodbye is not waited for
            self._finish(ClientClosedError(code, reason), ours=True)
            left = self._tasks.cancel()
        await wait_for_all(left, 1.0)

    async def _flush(self) -> None:
        deadline = monotonic() + self._flush_timeout
        self.incoming.read_on()  # the server's word comes behind the messages that nobody may read any more
        await wait_for_all(self.buffer.undecided(), self._flush_timeout)
        if self._attempt is not None:  # what is volatile is only written
            await self._attempt.flushed(max(0.0, deadline - monotonic()))

    def reconnect(self) -> None:
        """Leave the connection, or the wait for one, and dial now. The session goes on."""
        self._redial.at_once()
        if self._attempt is not None:
            self._attempt.mark_lost(4000, "reconnect", at_once=True)
        self._reconnect_now()

    def probe(self) -> None:
        """Something says that the link may be dead: ask the server, and dial again if it does not answer soon.

        While waiting for the next dial, this dials now.
        """
        if self._attempt is not None:
            self._attempt.probe()
        self._reconnect_now()

    def _reconnect_now(self) -> None:
        if not self._wakeup.done():
            self._wakeup.set_result(None)

    # ── sending ──

    def send(self, data: Any, *, event: str | None = None, key: str | None = None) -> asyncio.Future[None]:
        """Queue a message. Await what is returned to know that the server has accepted it; nobody has to.

        A client that is not started keeps the message until it is. Awaiting what is returned does not start it: a
        warning in the log says so after a second.

        Args:
            data: Anything that can be JSON, or bytes.
            event: What kind of message it is.
            key: Idempotency key: a message whose key the server has handled already is not handled again.

        Returns:
            A future, which fails with a `ClientError` if the message is not known to be accepted: with a
            `RefusedError` if the server refuses it, unless it has accepted it before; then `on_error` is told.

        Raises:
            ClientClosedError: The client is closed.
            BufferFullError: Too much is waiting.
            MessageTooLargeError: The server takes no message of this size.
            ValueError: The data cannot be JSON.
        """
        return self._queue("msg", data, event=event, key=key or self._key()).done

    def send_volatile(self, data: Any, *, event: str | None = None) -> bool:
        """Send a message now or never: `False` if there is no connection. It is neither kept nor acknowledged.

        Raises:
            MessageTooLargeError: The server takes no message of this size.
            ValueError: The data cannot be JSON.
        """
        attempt = self._attempt
        return attempt is not None and attempt.send_volatile(data, event)

    async def request(self, event: str, data: Any = None, *, timeout: float = 10.0, key: str | None = None) -> Any:
        """Send a message to a handler of the server, and return what it returns. Survives a reconnect in between.

        Cancelling withdraws it if it was not sent yet.

        Raises:
            RequestError: The server answered with an error.
            RequestTimeoutError: It did not answer in time.
            ClientClosedError: The client is closed.
            SessionLostError: The session was lost, and it is not known whether the request was handled.
            BufferFullError: Too much is waiting.
            NotStartedError: The client is not started.
        """
        self._check_started()
        request_id = f"c{next(self._ids)}"
        message = self._queue("msg", data, event=event, id=request_id, key=key or self._key())
        future = self._requests.open(request_id, message)
        try:
            if await wait_for_all([future], timeout):
                return future.result()
        finally:
            self._requests.forget(request_id)
            self.buffer.cancel(message)
        raise RequestTimeoutError(timeout)

    def _queue(self, type_: str, data: Any, **fields: Any) -> PendingMessage:
        if self._ending is not None:
            raise self._ending
        message = PendingMessage(type_, data, fields)
        self.buffer.add(message)
        if self._attempt is not None:
            self._attempt.wake()
        elif self._runner is None and not self._warns_unstarted:
            self._warns_unstarted = True
            asyncio.get_running_loop().call_later(STARTED_WITHIN, self._warn_unstarted)
        return message

    def _warn_unstarted(self) -> None:
        if self._runner is None and self._ending is None:
            logger.warning("messages wait to be sent, and nothing is: %s", NotStartedError())

    def _key(self) -> str | None:
        return f"{self._keys}{next(self._ids)}" if self._replay else None

    def _reply(self, request_id: str, data: Any, error: dict[str, str] | None) -> None:
        try:
            message = self._queue("reply", data if error is None else None, re=request_id, error=error)
        except Exception as problem:  # the data is the user's, and encoding it may raise anything
            self._cannot_reply(request_id, problem)
            return

        def look(done: asyncio.Future[None]) -> None:
            # A server may take less than the one of the connection in which the answer was queued.
            problem = None if done.cancelled() else done.exception()
            if isinstance(problem, MessageTooLargeError):
                self._cannot_reply(request_id, problem)

        message.done.add_done_callback(look)

    def _cannot_reply(self, request_id: str, problem: BaseException) -> None:
        """Answer with an error in place of what cannot be sent: who has asked shall not wait in vain."""
        if self._ending is not None:
            return
        self.emit("error", problem)
        why = str(problem) if isinstance(problem, ClientError) else "it cannot be encoded"
        error = {"code": "unsendable", "message": f"the client's answer cannot be sent: {why}"}
        try:
            self._queue("reply", None, re=request_id, error=error)
        except Exception as also:
            logger.warning("the request %r of the server is not answered: %s", request_id, also)

    # ── receiving ──

    def on(self, event: str = ANY) -> Callable[[F], F]:
        """Call a function with the data of each message of an event: `@client.on("chat")`.

        Handlers are called one after the other, in the order of the messages. What one returns answers the server, if
        the message was a request. One that waits for a `request` of its own holds up those behind it, and when 1,024
        messages wait, nothing more is read, answers included: start a task for that. Without a name it takes every
        event that has no handler of its own.
        """

        def register(handler: F) -> F:
            self.incoming.on(event, handler)
            return handler

        return register

    def __aiter__(self) -> AsyncIterator[Message]:
        """Iterate over the messages that no handler takes, until the client is closed.

        The loop ends after your own `close()`. It raises `ClientClosedError` when the client is closed for good
        otherwise.

        A loop that is slow holds up what comes behind the 1,024 messages that wait for it. Ten seconds after a loop
        was left, handlers and answers are held up by it no longer: then the oldest messages that wait are thrown away,
        until somebody iterates again.
        """
        self._check_started()
        return self.incoming.loop()

    async def __anext__(self) -> Message:
        self._check_started()
        message = await self.incoming.get()
        if message is None:
            raise StopAsyncIteration
        return message

    # ── what an attempt tells ──

    def _set_state(self, state: State) -> None:
        if state != self._state:
            self._state = state
            self.emit("state", state)

    def left_out(self, error: UnreadableFrameError) -> None:
        """A frame of the server could not be read."""
        self._unreadable += 1
        logger.log(logging.WARNING if self._unreadable == 1 else logging.DEBUG, "%s", error)
        self.emit("error", error)

    def refused(self, error: RefusedError) -> None:
        """The server has refused a message."""
        self._refused += 1
        logger.log(
            logging.WARNING if self._refused == 1 else logging.INFO, "the server has refused a message: %s", error
        )
        self.emit("error", error)

    def answered(self, request_id: str, data: Any, error: Any) -> None:
        """An answer has come."""
        self._requests.answered(request_id, data, error)

    def opened(self, outcome: str) -> None:
        """A connection is open."""
        if self._first_timer is not None:
            self._first_timer.cancel()
        if self._failed_dials:
            logger.info("connected to %s after %d failed dials", self._where, self._failed_dials)
            self._failed_dials = 0
        self._set_state("open")
        self.emit("open", outcome)

    def stable(self) -> None:
        """A connection has been open for long enough to forget what was before."""
        self._redial.stable()

    def broke_off(self) -> None:
        """The connection is lost in the middle of a large message of the server.

        The next connection begins the message anew. What happens to it each time would hold up all that comes behind
        it for ever, so it is left out at last, and told as a gap. A volatile message is not begun anew, see
        `not_unfinished`.
        """
        before, times = self._unfinished
        self._unfinished = (self.last, times + 1 if before == self.last else 1)
        if self._unfinished[1] >= MAX_UNFINISHED:
            self.last += 1
            self._unfinished = (0, 0)
            self.emit("gap", Gap(False, "unfinished", self.last, self.last))

    def not_unfinished(self) -> None:
        """Something else has come than the message that had broken off, or nothing: it is not begun anew."""
        self._unfinished = (0, 0)

    def lost_session(self, accepted: int) -> None:
        """The server has begun a new session in place of the one that was asked for."""
        self._unfinished = (0, 0)
        self.buffer.restart_session(accepted, replay=self._replay)
        self.incoming.begun_anew()
        self._requests.session_lost()

    async def credential(self, *, force: bool) -> str | None:
        """What the user's `auth` gives."""
        if self._auth is None:
            return None
        value = self._auth(force=force) if _takes_force(self._auth) else self._auth()
        value = await value if inspect.isawaitable(value) else value
        return None if value is None else str(value)

    async def address(self) -> str:
        """Where to connect."""
        value = self._url if isinstance(self._url, str) else self._url()
        return await value if inspect.isawaitable(value) else value

    @property
    def refused_credential(self) -> bool:
        """Whether the server has refused the last credential."""
        return self._redial.credential_rejected

    # ── dialling ──

    async def _run(self) -> None:
        try:
            while self._ending is None:
                self._set_state("connecting")
                lost = await self._one_connection()
                if self._ending is not None:
                    break
                self.emit("close", lost.code, lost.reason)
                if lost.code == 4429:
                    self.buffer.cut_off()
                delay = self._redial.after(lost)
                if self._redial.gives_session_up:
                    self.token = None
                if delay is None:
                    self._finish(ClientClosedError(lost.code, lost.reason))
                    break
                if self._ending is not None:  # a listener has closed it
                    break
                self._log_lost(lost, delay)
                self._set_state("waiting")
                self._wakeup = asyncio.get_running_loop().create_future()
                if delay > 0:
                    await wait_for_all([self._wakeup], delay)
        finally:
            self._finish(self._ending or ClientClosedError(1006, "cancelled"))

    async def _one_connection(self) -> ConnectionLost:
        attempt = self._attempt = ClientConnection(self, self._tasks, self._connect_timeout, self._stable_after)
        try:
            return await attempt.run(self._dial)
        finally:
            self._attempt = None

    def _log_lost(self, lost: ConnectionLost, delay: float) -> None:
        """Say that a connection is lost, or that there is none. Of dials that fail in a row the first is a warning."""
        how = f"code {lost.code}{f' ({lost.reason})' if lost.reason else ''}"
        if lost.was_open:
            logger.info("the connection to %s is lost: %s; the next dial is in %.1f s", self._where, how, delay)
            return
        self._failed_dials += 1
        self._last_failure = how
        level = logging.WARNING if self._failed_dials == 1 else logging.INFO
        logger.log(level, "cannot connect to %s: %s; the next dial is in %.1f s", self._where, how, delay)

    @property
    def _where(self) -> str:
        """The URL, without what may be secret in it."""
        if not isinstance(self._url, str):
            return "the server"
        return _SECRET.sub("", self._url)

    def _finish(self, how: ClientClosedError, *, ours: bool = False) -> None:
        if self._ending is not None:
            return
        self._ending = how
        if self._first_timer is not None:
            self._first_timer.cancel()
        if not ours:
            logger.warning("the client of %s is closed for good: code %d (%s)", self._where, how.code, how.reason)
        if left := sum(not done.done() for done in self.buffer.undecided()):
            logger.warning("the client is closed, and the server has not accepted %d messages", left)
        if self._attempt is not None:
            self._attempt.mark_lost(how.code if how.code in (1000, 4000) else 1000, how.reason)
        self._reconnect_now()
        self.token = None
        self.buffer.give_up(how)
        self._requests.give_up(how)
        self.incoming.close(None if ours else lambda: ClientClosedError(how.code, how.reason))
        self._set_state("closed")

    def _task_failed(self, task: asyncio.Task[Any], error: BaseException) -> None:
        logger.error("%s failed", task.get_name(), exc_info=error)
        if task is self._runner:
            self._finish(ClientClosedError(1006, f"a bug in the client: {error!r}"))


_HOW_TO_USE: Final = "write `async with connect(url) as client:`, or `client = connect(url).start()`"

_SECRET: Final = re.compile(r"(?<=://)[^/?#]*@|[?#].*", re.DOTALL)
"""The credentials and the query of a URL."""


def connect(url: str | Provider, **options: Any) -> Client:
    """Make a client, for `async with`. The arguments are those of `Evictable`."""
    return Client(url, **options)


def _takes_force(function: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(one.name == "force" or one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters)
