"""One connection from its handshake to its close code, around the user's endpoint."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import anyio
from fastapi import HTTPException, WebSocket, WebSocketException
from starlette.websockets import WebSocketState

from fastapi_ws_stabilizer.close_codes import SESSION_OVER, DisconnectReason, Ending, ending
from fastapi_ws_stabilizer.config import CompressionMode, DuplicatePolicy, WebSocketConfig
from fastapi_ws_stabilizer.connection.conversation import Conversation
from fastapi_ws_stabilizer.connection.endpoint import Endpoint, ending_for, find_exit_stack, is_bug, meaning
from fastapi_ws_stabilizer.connection.lifecycle import Connection
from fastapi_ws_stabilizer.connection.outbox_owner import SlowClient
from fastapi_ws_stabilizer.connection.parts import Parts
from fastapi_ws_stabilizer.connection.room import Room
from fastapi_ws_stabilizer.connection.socket import StableSocket
from fastapi_ws_stabilizer.errors import DuplicateClientError, ShutdownError, SocketClosed, socket_closed
from fastapi_ws_stabilizer.hub.delivery import Delivery
from fastapi_ws_stabilizer.hub.heartbeat import Heartbeat
from fastapi_ws_stabilizer.hub.lifetimes import Lifetimes
from fastapi_ws_stabilizer.hub.presence import Presence, Roster
from fastapi_ws_stabilizer.hub.turns import Turns
from fastapi_ws_stabilizer.reports import Reports
from fastapi_ws_stabilizer.routing.dispatch import Dispatcher
from fastapi_ws_stabilizer.routing.greeting import Reception
from fastapi_ws_stabilizer.routing.hooks import Hooks
from fastapi_ws_stabilizer.routing.identity import fresh_client_id
from fastapi_ws_stabilizer.routing.resumption import Resumption
from fastapi_ws_stabilizer.servers.link import offers_link
from fastapi_ws_stabilizer.sessions.idempotency import Seen
from fastapi_ws_stabilizer.sessions.session import ResumeOutcome, Session
from fastapi_ws_stabilizer.sessions.tokens import ReconnectTokens
from fastapi_ws_stabilizer.tasks import TaskSet, wait_for_all
from fastapi_ws_stabilizer.wire.v1 import SUBPROTOCOL, offers_v1

_Own = tuple[str, Connection, Any]
_own: contextvars.ContextVar[_Own | None] = contextvars.ContextVar("own_connections", default=None)
"""The connections that the current task has opened, by client id. Replaced, never changed."""


class Serving:
    """Opens connections, and ends each with the code that fits how its endpoint ended.

    Made for one event loop.

    Attributes:
        delivery: Who is connected, in which rooms, and how they are reached.
        unfinished: The open connections and those whose end is still being worked on.
        closing: Whether no more connections are taken.
    """

    def __init__(
        self,
        config: WebSocketConfig,
        reports: Reports,
        hooks: Hooks,
        dispatcher: Dispatcher,
        tokens: ReconnectTokens,
    ) -> None:
        self._config = config
        self._reports = reports
        self._hooks = hooks
        self._dispatcher = dispatcher
        self._tasks = TaskSet(self._task_failed)
        turns = Turns(config.num_shards, reports)
        self.delivery: Delivery[Connection] = Delivery(
            config,
            reports,
            turns,
            self._tasks,
            joined=functools.partial(self._presence, "join"),
            left=functools.partial(self._presence, "leave"),
            wanted=functools.partial(hooks.has, "join", "leave"),
            away_of=lambda client_id: self.sessions.away_of(client_id),
        )
        self.registry = self.delivery.registry
        self.resumption = Resumption(config, reports, hooks, self.delivery, tokens)
        self.sessions = self.resumption.sessions
        self._reception = Reception(config, reports, self.sessions)
        self._seen = Seen()
        self.heartbeat = Heartbeat(config, reports)
        self.lifetimes = Lifetimes(config)
        self.unfinished: set[Connection] = set()
        self.closing = False
        self._told_of_server = False
        self._hook_slots = asyncio.Semaphore(config.max_concurrent_cleanup)  # of rooms and of slow clients
        self._parts = Parts(
            config,
            reports,
            self._tasks,
            turns,
            next_shard=self.registry.next_shard,
            left=self._left,
            finished=self.unfinished.discard,
            disconnected=hooks.disconnect,
            session_over=self.resumption.session_over,
            slow=self._slow,
            failed=hooks.error,
        )

    # ── opening ──

    async def open_by_dependency(
        self, websocket: WebSocket, client_id: str | None, *, identity: Any, control_frames: bool
    ) -> Connection:
        """Run the handshake hooks, accept, register, run the connect hooks.

        Args:
            websocket: What the server handed us.
            client_id: Whose it is; `None` if the client has not said so.
            identity: What the identity dependency returned.
            control_frames: Whether text pings and pongs are answered and kept from the endpoint.

        Raises:
            WebSocketException: The connection is over already; Starlette's handler for it has nothing left to do.
            HTTPException: A handshake hook refused, or failed (500).
            ShutdownError: The manager was shut down meanwhile.
        """
        numbered = offers_v1(websocket.scope.get("subprotocols") or ())
        claimed = None if numbered else self.resumption.claim(websocket, client_id)
        connection = Connection(
            websocket,
            client_id or claimed or fresh_client_id(),
            self._parts,
            control_frames=control_frames,
            endpoint=Endpoint(cancellable=True),
            numbered=numbered,
        )
        connection.face = StableSocket(connection, self, identity=identity)
        try:
            await self._hooks.handshake(connection.face)
        except Exception as error:
            if not is_bug(error):
                raise
            await connection.bug("handshake_hook_failed", error)
            raise HTTPException(500) from error
        if self.closing:
            raise ShutdownError
        connection.before_accept()
        await websocket.accept(SUBPROTOCOL if numbered else None)
        if numbered:
            await self._begin_conversation(connection, is_known=client_id is not None)
        proven = claimed is not None and self.resumption.redeem(websocket, claimed)
        if claimed is not None and not proven and client_id is None:  # and the handshake hooks took it for that client
            raise WebSocketException(4401, "the token was used meanwhile")
        try:
            await self._enter(connection, proven=proven)
        except (SocketClosed, DuplicateClientError) as error:
            raise WebSocketException(connection.ending.code if connection.ending else error.close_code) from error
        return connection

    async def _begin_conversation(self, connection: Connection, *, is_known: bool) -> None:
        """Take the hello of a client, and give the connection to its session.

        Args:
            connection: The connection.
            is_known: Whether the endpoint has said who the client is. Else it is who its session says.

        Raises:
            WebSocketException: It was refused, and is closed.
        """
        good_for: list[float | None] = []

        async def authenticate(credential: str | None) -> Ending | None:
            try:
                good_for.append(await self._hooks.auth(connection.face, credential))
            except Exception as error:
                if is_bug(error):
                    await connection.bug("auth_hook_failed", error)
                return ending_for(error)
            return None

        def whose(session: Session | None) -> str:
            if session is not None and not is_known:
                connection.client_id = session.client_id
            return connection.client_id

        greeting = await self._reception.greet(connection.websocket, whose, authenticate, self._lets_in)
        if connection.face._user_data:  # a handshake hook has set it
            if greeting.session.user_data is None:
                greeting.session.user_data = connection.face._user_data
            else:  # the same dict: a handler of the connection before may still fill it
                greeting.session.user_data.update(connection.face._user_data)
        connection.conversation = Conversation(
            connection, greeting, self._seen, functools.partial(self._renew, connection)
        )
        connection.conversation.credential_good_for(good_for[0])
        self.sessions.returned(greeting.session)

    def _lets_in(self, client_id: str, session: Session | None) -> bool:
        """Whether a client that proves to have a session, or wants a new one, may come beside those that it has."""
        return self._config.on_duplicate is not DuplicatePolicy.REJECT or not self._others(client_id, session)

    def _others(self, client_id: str, session: Session | None) -> list[Connection]:
        """The connections of a client but those of one session: taking one's own session over is no duplicate."""
        everyone = self.registry.of_client(client_id)
        return [one for one in everyone if session is None or one.member is not session]

    def _renew(self, connection: Connection, credential: str | None) -> None:
        """A client has sent a new credential."""
        self._tasks.spawn(self._look_at(connection, credential), name=f"ws-auth-{connection.connection_id}")

    async def _look_at(self, connection: Connection, credential: str | None) -> None:
        if connection.conversation is None:
            return
        try:
            good_for = await self._hooks.auth(connection.face, credential)
        except Exception as error:
            if is_bug(error):
                await connection.bug("auth_hook_failed", error)
            how = ending_for(error)
            connection.end(how.reason, code=how.code, text=how.text)
        else:
            connection.conversation.credential_taken(good_for)

    async def open_by_hand(
        self, websocket: WebSocket, client_id: str, metadata: Mapping[str, Any] | None
    ) -> Connection:
        """Take over a WebSocket that the caller has accepted, register it, run the connect hooks.

        In a FastAPI endpoint the connection then ends as one of the dependency does, with an honest close code.

        Raises:
            RuntimeError: It is not accepted yet.
            SocketClosed: It was refused by a connect hook, or is gone already.
            DuplicateClientError: `on_duplicate="reject"` refused it.
        """
        if websocket.application_state is not WebSocketState.CONNECTED:
            raise RuntimeError("connect() takes an open WebSocket: call `await websocket.accept()` before it")
        if isinstance(known := getattr(websocket._receive, "__self__", None), Connection):
            raise RuntimeError(f"this WebSocket is connected already, as client {known.client_id!r}")
        stack = find_exit_stack(websocket.scope)
        connection = Connection(
            websocket,
            client_id,
            self._parts,
            control_frames=True,
            endpoint=Endpoint(cancellable=stack is not None),
        )
        connection.face = StableSocket(connection, self, metadata=metadata)
        task = asyncio.current_task()
        if stack is not None:

            async def leave(_: Any, error: BaseException | None, __: Any) -> bool:
                failure = await self.leave(connection, error)
                if failure is None:
                    return True
                if failure is error:
                    return False
                raise failure from error

            stack.push_async_exit(leave)
        elif task is not None:
            task.add_done_callback(lambda done: self._task_ended(connection, done))
        await self._enter(connection, proven=self.resumption.take_proof(client_id))
        return connection

    @staticmethod
    def _task_ended(connection: Connection, task: asyncio.Task[Any]) -> None:
        """The task that has connected a socket by hand is over, and no exit stack has told us before."""
        if connection.ending is None:
            how = ending_for(asyncio.CancelledError() if task.cancelled() else task.exception())
            connection.end(how.reason, code=how.code, text=how.text)

    async def _enter(self, connection: Connection, *, proven: bool) -> None:
        # Child tasks and hooks inherit it, so that they too mean this connection by its client id.
        _own.set((connection.client_id, connection, _own.get()))
        self.unfinished.add(connection)
        connection.open()
        self._say_what_is_left_to_the_server(connection)
        if connection.ending is not None:  # it was over before we came: a link tells so at once
            await self.leave(connection, None)
            raise self._closed(connection)
        session = None if connection.conversation is None else connection.conversation.session
        older = self._others(connection.client_id, session)
        policy = self._config.on_duplicate
        if older and policy is DuplicatePolicy.REJECT and not proven:  # else the older one is half-open
            error = DuplicateClientError(connection.client_id)
            await self.leave(connection, error)
            raise error
        if self.closing:
            connection.end(DisconnectReason.SERVER_SHUTDOWN)
            await self.leave(connection, None)
            raise self._closed(connection)
        self.registry.add(connection, mailbox=session is None)
        self.heartbeat.add(connection)
        self.lifetimes.add(connection)
        if session is not None:
            left, session.left = session.left, {}
            self.delivery.back(session, left)  # type: ignore[arg-type]
        elif proven:
            plain = [one for one in older if one.conversation is None]  # what a session has is its own
            self.resumption.restore(connection, plain[-1] if plain else None)
        if policy is not DuplicatePolicy.ALLOW:
            self._replace(older, connection.client_id, session)
        try:
            await connection.wait_for_those_before()
            if connection.ending is None:
                with connection.activity.busy():
                    await self._begin_hooks(connection, session)
        except BaseException as error:
            failure = await self.leave(connection, error)
            if failure is error:
                raise
            raise self._closed(connection) from error
        if connection.ending is not None:  # a hook closed it, or the client has left
            await self.leave(connection, None)
            raise self._closed(connection)

    def _replace(self, older: Sequence[Connection], client_id: str, session: Session | None) -> None:
        """A client is to be here once: end what else there is of it."""
        for connection in older:
            # A client with a session must not come back for it, or two devices would throw each other out for ever.
            code = SESSION_OVER if connection.conversation is not None else None
            connection.end(DisconnectReason.REPLACED, code=code)
        for away in self.sessions.away_of(client_id):
            if away is not session:
                self.sessions.supersede(away)

    async def _begin_hooks(self, connection: Connection, session: Session | None) -> None:
        connection.hooks_wanted = connection.begun = True
        outcome = connection.face.resumed
        back = outcome in (ResumeOutcome.FULL, ResumeOutcome.GAP)
        if session is not None:
            back = back and session.admitted  # the connection before may have been lost in its connect hooks
            session.known = True
        if back:
            await self._hooks.resume(connection.face, outcome)
        else:
            await self._hooks.connect(connection.face)
        if session is not None:
            session.admitted = True

    def _say_what_is_left_to_the_server(self, connection: Connection) -> None:
        """Say, once, what this library does not do because the server, or a middleware, stands between."""
        if self._told_of_server or connection.is_linked:
            return
        self._told_of_server = True
        if offers_link(connection.websocket.scope):
            self._reports.tell("link_wrapped", logging.WARNING)
        if self._config.compression is CompressionMode.NONE:
            self._reports.tell("compression_left_to_server", logging.WARNING)

    def _closed(self, connection: Connection) -> SocketClosed:
        return socket_closed(connection.ending or ending(DisconnectReason.COMPLETED))

    # ── what sockets ask for ──

    async def run(self, socket: StableSocket, concurrency: int) -> None:
        """Hand every message of a socket to the handlers."""
        await self._dispatcher.run(socket._connection, concurrency)

    def join(self, connection: Connection, room: str, metadata: Mapping[str, Any] | None) -> Roster:
        """Let a connection into a room."""
        return self.delivery.join(connection.member, room, metadata)

    def leave_room(self, connection: Connection, room: str) -> bool:
        """Take a connection out of a room."""
        return self.delivery.leave(connection.member, room)

    def rooms_of(self, connection: Connection) -> tuple[str, ...]:
        """The rooms that a connection is in."""
        return self.delivery.rooms.of(connection.member)

    def history(self, connection: Connection, room: str, count: int) -> None:
        """Send the last messages of a room to a connection."""
        self.delivery.recall(connection.member, room, count)

    async def _presence(self, event: str, who: Presence) -> None:
        async with self._hook_slots:
            await self._hooks.presence(event, Room(who.room, lambda: self.delivery), who)

    def _slow(self, socket: StableSocket, how: SlowClient) -> None:
        if self._hooks.has("slow"):
            self._tasks.spawn(self._tell_slow(socket, how), name="ws-slow-hooks")

    async def _tell_slow(self, socket: StableSocket, how: SlowClient) -> None:
        async with self._hook_slots:
            await self._hooks.slow(socket, how)

    # ── ending ──

    async def leave(self, connection: Connection, error: BaseException | None) -> BaseException | None:
        """End a connection whose endpoint has returned (`None`) or let `error` escape, and wait until that is done.

        Dependencies that were entered before ours must learn that something failed, or they would commit what should
        be rolled back. So an error is not swallowed but exchanged for a `WebSocketException`, which Starlette handles
        in silence because the connection is closed by then. A bug was logged here before, once.

        Returns:
            What has to be raised instead of `error`; `error` itself if it is not ours to touch; `None` if nothing is.
        """
        endpoint = connection.endpoint
        cancelled_by_us = error is not None and endpoint.is_own_cancellation(error)
        endpoint.has_returned()
        if error is not None and not cancelled_by_us and self._is_foreign(endpoint, error):
            connection.end(DisconnectReason.SERVER_SHUTDOWN)
            if isinstance(error, asyncio.CancelledError):
                # Whoever cancels us means the endpoint; the close frame and the hooks still have their time. The scope
                # is for callers like Starlette's TestClient, whose cancellation strikes at every await.
                with anyio.CancelScope(shield=True):
                    await wait_for_all([connection.finished], None)
            return error
        bug = error is not None and not cancelled_by_us and (is_bug(error) or not isinstance(error, Exception))
        how = ending(DisconnectReason.ERROR) if bug else ending_for(error)
        connection.end(how.reason, code=how.code, text=how.text)
        if bug and error is not None:
            await connection.bug("endpoint_failed", error)
        await wait_for_all([connection.finished], None)
        if error is None or isinstance(meaning(error), SocketClosed):
            return None
        # Starlette's handler closes the WebSocket, which does nothing any more, but stumbles if the user did before.
        connection.websocket.application_state = WebSocketState.CONNECTED
        return WebSocketException(connection.ending.code if connection.ending else 1000)

    @staticmethod
    def _is_foreign(endpoint: Endpoint, error: BaseException) -> bool:
        """Whether an exception is nobody's bug and has to go on: an exit, or a cancellation of this very task."""
        if isinstance(error, (Exception, asyncio.CancelledError)) or getattr(error, "exceptions", None):
            return endpoint.is_cancelled_by_others(error)
        return True

    def _left(self, connection: Connection) -> None:
        self.heartbeat.remove(connection)
        self.lifetimes.remove(connection)
        self.resumption.left(connection)

    def own_connection(self, client_id: str) -> Connection | None:
        """The connection that the current task, or the one that has started it, has opened under this client id."""
        own = _own.get()
        while own is not None and own[0] != client_id:
            own = own[2]
        if own is None or not own[1].belongs_to(self._parts):
            return None
        connection = own[1]
        if connection.is_finished and connection.endpoint.tracked:
            return None  # its endpoint is over: this is a task that outlives it, and means whoever is connected now
        return connection

    def meant(self, client_id: str) -> list[Connection]:
        """The connections that a call with this client id means: the current task's own one, else all of the client."""
        own = self.own_connection(client_id)
        return self.registry.of_client(client_id) if own is None else [own]

    def reopen(self) -> None:
        """Take connections again."""
        self.closing = False
        self._reception.reopen()

    def close(self) -> None:
        """Take no more connections, and refuse those that are being opened."""
        self.closing = True
        self._reception.close()

    async def stop(self, patience: float) -> None:
        """Let go of the heartbeat, of the sessions, and of tasks that are left over.

        Args:
            patience: Seconds that the hooks for the end of sessions may take in all.
        """
        self.heartbeat.stop()
        self.lifetimes.stop()
        await wait_for_all(self._reception.guests, 1.0)
        left_out = [connection.run_disconnect_hooks() for connection in self.unfinished]
        if left_out:  # their time is over, but nobody's disconnect goes untold
            hooks = [self._tasks.spawn(hook, name="ws-last-hooks") for hook in left_out]
            await wait_for_all(hooks, 1.0)
        ends = [self.resumption.session_over(connection) for connection in self.unfinished]
        await wait_for_all([self._tasks.spawn(end, name="ws-last-ends") for end in ends], patience)
        for connection in list(self.unfinished):
            connection.give_up()
        await self.resumption.stop(patience)
        self.delivery.stop()
        if left_over := self._tasks.cancel():
            await wait_for_all(left_over, 1.0)

    def _task_failed(self, task: asyncio.Task[Any], error: BaseException) -> None:
        self._reports.bug("internal_task_failed", error, task=task.get_name())
