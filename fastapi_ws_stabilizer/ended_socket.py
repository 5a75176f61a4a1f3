"""What is kept of a connection whose client may come back, after everything was done for it."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from fastapi_ws_stabilizer.close_codes import CloseInfo, DisconnectReason, local_close
from fastapi_ws_stabilizer.connection.connection import Connection
from fastapi_ws_stabilizer.connection.inbox import Inbox, InboxLimits
from fastapi_ws_stabilizer.connection.messages import Messages
from fastapi_ws_stabilizer.memory.budget import MemoryBudget
from fastapi_ws_stabilizer.sessions.session import ResumeOutcome, Session
from fastapi_ws_stabilizer.socket import StableSocket
from fastapi_ws_stabilizer.wire.encoded import EncodedMessage


class _NoOutbox:
    """The outbox of a connection that is over: it is empty and takes nothing."""

    held_bytes = 0

    def __len__(self) -> int:
        return 0

    def try_enqueue(self, _: EncodedMessage) -> bool:
        return False

    def put_now(self, _: EncodedMessage) -> bool:
        return False

    async def put_wait(self, *_: object) -> bool:
        return False

    @property
    def done(self) -> asyncio.Future[None]:
        done = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done


_OUTBOX: Final[Any] = _NoOutbox()
_INBOX: Final = Inbox(InboxLimits(0, 0))
_INBOX.close(discard=True)


class EndedConnection(Messages):
    """The facts of a connection that has ended, without its WebSocket and anything else of the server's.

    It stands in the place of the connection in the socket that hooks for the end of a session get, which may be
    minutes after the connection was over.
    """

    __slots__ = ("_outcome", "_session", "opened_at")

    predecessors: Final = ()
    hooks_done: Final = True
    is_finished: Final = True
    pause = None

    def __init__(self, connection: Connection) -> None:
        self.client_id = connection.client_id
        self.connection_id = connection.connection_id
        self.opened_at = connection.opened_at
        self.close_info = connection.close_info
        self.dropped_messages = connection.dropped_messages
        self.liveness = connection.liveness
        self.opened = True
        self.protocol = None
        self.outbox = _OUTBOX
        self.inbox = _INBOX
        self._parts = connection._parts
        self._session = connection.session
        self._outcome = connection.outcome

    @property
    def session(self) -> Session | None:
        """The session that it belonged to."""
        return self._session

    @property
    def outcome(self) -> ResumeOutcome:
        """What its client had got back."""
        return self._outcome

    @property
    def recipient(self) -> Any:
        """As what it was in rooms."""
        return self._session or self

    @property
    def budget(self) -> MemoryBudget:
        """Where what was held for it was counted."""
        return self._parts.budget

    @property
    def memory_usage(self) -> int:
        """Bytes that are held for its session."""
        return 0 if self._session is None else self._session.memory_usage

    @property
    def websocket(self) -> Any:
        """Nothing of the handshake is kept.

        Raises:
            RuntimeError: Always. It says what to do.
        """
        raise RuntimeError(
            "the WebSocket and its handshake (headers, url, path_params, state, ...) are gone with the connection: "
            "keep what this hook needs in ws.user_data"
        )

    async def wait_for_hooks(self) -> None:
        """The disconnect hooks have run."""

    async def wait_closing(self) -> CloseInfo:
        """How it ended."""
        return self.close_info or local_close(DisconnectReason.SERVER_SHUTDOWN)

    async def yield_after_end(self) -> None:
        """Code that goes on after the end gives the event loop its turns."""
        await asyncio.sleep(0)

    def spawn(self, coroutine: Any, _: str | None) -> Any:
        """Start no task any more."""
        coroutine.close()
        self.check_open()

    # ── what a connection that is over does not do ──

    def close(self, *_: Any, **__: Any) -> bool:
        """It has ended."""
        return False

    def on_delivered(self) -> None:
        """Nothing is delivered."""

    def on_nonzero(self) -> None:
        """It holds nothing."""

    def evict(self) -> None:
        """It holds nothing."""

    def on_limit_exceeded(self, held: int) -> None:
        """It holds nothing."""

    def on_connection_lost(self, error: BaseException) -> None:
        """It has ended."""


def socket_after_end(socket: StableSocket) -> StableSocket:
    """A socket that knows what another one knew, and does not hold its connection."""
    ended: Any = EndedConnection(socket._connection)
    kept = StableSocket(ended, socket._services, identity=socket.identity)
    kept._metadata, kept._user_data = socket._metadata, socket._user_data
    return kept
