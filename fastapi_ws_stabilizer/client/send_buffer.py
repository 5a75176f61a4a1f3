"""What a client has to send: kept until the server has accepted it, bounded, in order."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, Final, Literal

from fastapi_ws_stabilizer.client.errors import BufferFullError, ClientError, MessageTooLargeError, SessionLostError
from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.wire.identifiers import NAME_RULE, is_name
from fastapi_ws_stabilizer.wire.strict_json import check_json
from fastapi_ws_stabilizer.wire.v1.frames import ACK_EVERY, MAX_SEQ, envelope

NO_LIMIT: Final = 2**62

FIRST_WINDOW: Final = 128
"""Messages that are on their way at most before the server has accepted any. With each that it accepts there may be one
more, so that it takes a moment to send fast, and few are on their way when a server with a rate refuses one."""

RESUMED_WINDOW: Final = ACK_EVERY
"""The same at the beginning of each later connection: so many are acknowledged at once."""

MAX_WINDOW: Final = 512
"""The same at most, however many were accepted. So much comes behind a refused message without that the server ends the
connection."""

MAX_REMEMBERED: Final = 256
"""Accepted messages of which it is known what they were, for a server that refuses one later."""

SEQ_BYTES: Final = len(f',"seq":{MAX_SEQ}')
"""What its number adds to a frame at most."""


class PendingMessage:
    """One message, encoded once: as it was when it was queued, however often it is sent.

    Args:
        type_: `msg` or `reply`.
        data: What it carries: bytes, or anything that can be JSON.
        fields: The other fields of its frame.

    Attributes:
        seq: Its number; 0 until it is sent for the first time.
        sent_at: When it was sent last, or was to be sent again, on the monotonic clock.
        type: `msg` or `reply`.
        size: Bytes of its frame without the number.
        done: Done when the server has accepted it.

    Raises:
        ValueError: The data cannot be JSON that the server takes, a name is none, or there are too many fields for a
            binary frame.
    """

    __slots__ = ("_encoded", "_fields", "done", "sent_at", "seq", "size", "type")

    def __init__(self, type_: str, data: Any, fields: dict[str, Any]) -> None:
        self.seq = 0
        self.sent_at = 0.0
        self.type = type_
        self._fields = fields
        self._encoded: str | bytes  # the data itself if it is bytes, else what stands behind the number in the frame
        if isinstance(data, (bytes, bytearray, memoryview)):
            self._encoded = bytes(data)
            # With the largest number: whether the fields fit is known now, and not when a number is given.
            validate_frame(b"", fields)
            self.size = len(envelope(type_, b"", seq=MAX_SEQ, **fields)) - SEQ_BYTES + len(self._encoded)
        else:
            text = str(validate_frame(envelope(type_, data, **fields), fields))
            self._encoded = text[len(_head(type_)) :]
            self.size = len(text) if text.isascii() else len(text.encode("utf-8"))
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def frame(self) -> str | bytes:
        """The frame, with its number."""
        if isinstance(self._encoded, bytes):
            return envelope(self.type, self._encoded, seq=self.seq, **self._fields)
        return f'{_head(self.type)},"seq":{self.seq}{self._encoded}'

    @property
    def event(self) -> str | None:
        """What kind of message it is."""
        event: str | None = self._fields.get("event")
        return event

    def accept(self) -> None:
        """The server has it."""
        if not self.done.done():
            self.done.set_result(None)

    def fail(self, error: Exception) -> None:
        """It will never be known to be accepted."""
        if not self.done.done():
            self.done.set_exception(error)
            self.done.exception()  # whoever waits gets it; nobody has to


def validate_frame(frame: str | bytes, fields: dict[str, Any]) -> str | bytes:
    """Return a frame that the server takes: it would end the session of who sends another.

    Raises:
        ValueError: It has a name in it that is none, or JSON that nobody takes.
    """
    for field in ("event", "key", "re"):
        name = fields.get(field)
        if name is not None and not is_name(name):
            raise ValueError(f"{field} is {NAME_RULE}")
    if isinstance(frame, str):
        check_json(frame)
    return frame


def _head(type_: str) -> str:
    """What a text frame begins with: the number comes behind it."""
    return f'{{"type":"{type_}"'


class SendBuffer:
    """Messages that are not accepted yet: those that were sent, and those that never were.

    Args:
        max_messages: Most messages.
        max_bytes: Most bytes of them.
        overflow: What happens when one more comes: `"reject"` raises, `"drop_oldest"` lets one go that was never sent.

    Attributes:
        max_frame: Largest frame that the server takes.
    """

    def __init__(self, max_messages: int, max_bytes: int, overflow: Literal["reject", "drop_oldest"]) -> None:
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._drop_oldest = overflow == "drop_oldest"
        self.max_frame = NO_LIMIT
        self._next = 1
        self._sent: deque[PendingMessage] = deque()  # sent in this or an earlier connection, with a number
        self._again: deque[PendingMessage] = deque()  # those of them that this connection has not sent yet
        self._fresh: deque[PendingMessage] = deque()  # never sent
        self._bytes = 0
        self._window = FIRST_WINDOW
        self._accepted: deque[tuple[int, str | None]] = deque(maxlen=MAX_REMEMBERED)

    def __len__(self) -> int:
        return len(self._sent) + len(self._fresh)

    @property
    def oldest_sent(self) -> PendingMessage | None:
        """The message that has waited longest for the server's word."""
        return self._sent[0] if self._sent else None

    def undecided(self) -> list[asyncio.Future[None]]:
        """The futures of all messages that are not accepted yet."""
        return [message.done for message in (*self._sent, *self._fresh)]

    def add(self, message: PendingMessage) -> None:
        """Take a message.

        Raises:
            MessageTooLargeError: The server would not take it.
            BufferFullError: There is no room.
        """
        if message.size + SEQ_BYTES > self.max_frame:
            raise MessageTooLargeError(message.size, self.max_frame)
        while len(self) >= self._max_messages or (len(self) and self._bytes + message.size > self._max_bytes):
            if not self._drop_oldest or not self._fresh:
                raise BufferFullError
            self._let_go(self._fresh.popleft(), BufferFullError())
        self._fresh.append(message)
        self._bytes += message.size

    def cancel(self, message: PendingMessage) -> bool:
        """Take a message back that was never sent; `False` if it was."""
        if message not in self._fresh:
            return False
        self._fresh.remove(message)
        self._bytes -= message.size
        return True

    def next(self) -> PendingMessage | None:
        """The next message to send, with its number; `None` if there is none, or enough are on their way."""
        if len(self._sent) - len(self._again) >= self._window:
            return None
        while self._again:
            message = self._again.popleft()
            if self._sent and message.seq >= self._sent[0].seq:  # else it was accepted meanwhile
                message.sent_at = monotonic()
                return message
        fresh = self._next_fresh()
        if fresh is None:
            return None
        fresh.seq, fresh.sent_at = self._next, monotonic()
        self._next += 1
        self._sent.append(fresh)
        return fresh

    def _next_fresh(self) -> PendingMessage | None:
        """The next message that was never sent. One that the server would not take fails."""
        while self._fresh:
            message = self._fresh.popleft()
            if message.size + SEQ_BYTES <= self.max_frame:
                return message
            self._let_go(message, MessageTooLargeError(message.size, self.max_frame))
        return None

    def accepted(self, seq: int) -> None:
        """The server has everything up to a number."""
        while self._sent and self._sent[0].seq <= seq:
            message = self._sent.popleft()
            self._bytes -= message.size
            self._window = min(self._window + 1, MAX_WINDOW)
            self._accepted.append((message.seq, message.event))
            message.accept()

    def put_off(self, seq: int) -> bool:
        """The server has too much at the moment: it has not accepted a message, and what was sent behind it is ignored.

        All of that is sent again, carefully: one message, and more when that is accepted.

        Returns:
            Whether there is such a message.
        """
        if not self._sent or not self._sent[0].seq <= seq <= self._sent[-1].seq:
            return False
        self._again = deque(message for message in self._sent if message.seq >= seq)
        self._window = len(self._sent) - len(self._again) + 1
        return True

    def cut_off(self) -> None:
        """The server has ended the connection because it was sent too much: begin carefully in the next one."""
        self._window = 1

    def refused(self, seq: int, error: Exception) -> str | None:
        """The server has accepted a message and refused it: it fails, if that is not too late. Returns its event."""
        for message in self._sent:
            if message.seq == seq:
                message.fail(error)
                return message.event
        return next((event for number, event in self._accepted if number == seq), None)

    def resume(self, accepted: int) -> None:
        """The session goes on in a new connection: what the server has not accepted is sent again."""
        self.accepted(accepted)
        self._window = min(self._window, RESUMED_WINDOW)
        self._next = max(self._next, accepted + 1)
        self._again = deque(self._sent)
        now = monotonic()
        for message in self._again:
            message.sent_at = now

    def restart_session(self, accepted: int, *, replay: bool) -> list[PendingMessage]:
        """It is a new session: what was sent in the old one fails, or is sent again under new numbers.

        Answers fail whether they were sent or not: who has asked is gone, and in the new session another request may
        have the same id.

        Returns:
            Those that failed.
        """
        before, self._sent, self._again = self._sent, deque(), deque()
        if before:
            self._window = min(self._window, RESUMED_WINDOW)
        self._next = accepted + 1
        self._accepted.clear()
        failed = [message for message in before if not replay or message.type == "reply"]
        failed += [message for message in self._fresh if message.type == "reply"]
        kept = before if replay else ()
        self._fresh = deque(message for message in (*kept, *self._fresh) if message.type != "reply")
        for message in failed:
            self._let_go(message, SessionLostError())
        return failed

    def give_up(self, error: ClientError) -> None:
        """Nothing more is sent."""
        for message in (*self._sent, *self._fresh):
            message.fail(error)
        self._sent.clear()
        self._again.clear()
        self._fresh.clear()
        self._bytes = 0

    def _let_go(self, message: PendingMessage, error: ClientError) -> None:
        self._bytes -= message.size
        message.fail(error)
