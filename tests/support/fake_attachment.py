"""A connection as a session sees it, without a socket."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.queueing import EnqueueResult
from fastapi_ws_stabilizer.wire.encoded import EncodedMessage
from tests.support.fake_outbox import FakeOutbox


class FakeAttachment(FakeOutbox):
    """A connection with a list as its outbox, which takes frames as a test decides.

    Attributes:
        calm: Whether the fast path takes frames.
        room: Whether other paths take frames.
        verdict: Result of `offer_new`, the slow path.
        before_enqueue: Called before a frame is queued on the slow path, as if the sender had waited.
    """

    def __init__(self, *, calm: bool = True, room: bool = True) -> None:
        super().__init__()
        self.calm = calm
        self.room = room
        self.verdict = EnqueueResult.QUEUED
        self.before_enqueue: Callable[[], None] | None = None
        self.socket: Any = f"socket of {id(self)}"
        self.used = False

    @property
    def owner(self) -> FakeAttachment:
        """Itself: it is the owner of its outbox."""
        return self

    @property
    def connection(self) -> FakeAttachment:
        """Itself: it is the connection of its outbox."""
        return self

    @property
    def outbox(self) -> FakeAttachment:
        """Itself: it is its own outbox."""
        return self

    @property
    def texts(self) -> list[str | None]:
        """The texts that were queued."""
        return [frame.text for frame in self.frames]

    def try_enqueue(self, frame: EncodedMessage) -> bool:
        """Queue a frame on the fast path."""
        if self.calm:
            self.frames.append(frame)
        return self.calm

    def try_send(self, frame: EncodedMessage) -> bool:
        """Send a frame at once."""
        return self.try_enqueue(frame)

    def offer_new(self, frame: EncodedMessage) -> EnqueueResult:
        """Queue a frame on the slow path."""
        if self.before_enqueue is not None:
            self.before_enqueue()
        if self.verdict is EnqueueResult.SLOW or not self.room:
            self.close(DisconnectReason.SLOW_CONSUMER)
            return EnqueueResult.CLOSED
        if self.verdict is not EnqueueResult.CLOSED:
            self.frames.append(frame)
        return self.verdict

    def put(self, frame: EncodedMessage) -> bool:
        """Queue a frame if there is room."""
        if self.room:
            self.frames.append(frame)
        return self.room

    def make_room(self, size: int) -> bool:
        """Return whether there is room."""
        return self.room

    def preload(self, frames: Iterable[EncodedMessage]) -> None:
        """Queue frames regardless of the room."""
        self.frames.extend(frames)

    async def put_wait(
        self, frame: EncodedMessage, number: Callable[[EncodedMessage], int] | None = None
    ) -> int | None:
        """Queue a frame if there is room, and return its number; return `None` if it is closed."""
        if not self.room:
            return None
        self.frames.append(frame)
        return 0 if number is None else number(frame)
