"""Messages to send: bounded, ordered, and buffered until the server accepts them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from typing import Any, Final, Literal

from fastapi_ws_stabilizer.client.errors import BufferFullError, ClientError, MessageTooLargeError, SessionLostError
from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.wire.identifiers import NAME_RULE, is_name
from fastapi_ws_stabilizer.wire.strict_json import check_json
from fastapi_ws_stabilizer.wire.v1.frames import ACK_EVERY, MAX_SEQ, envelope

NO_LIMIT: Final = 2**62

FIRST_WINDOW: Final = 128
"""Maximum number of unacknowledged messages before the server has acknowledged any. It grows by one with each
acknowledged message. This slow start keeps few messages in flight if the server rejects one because of a rate limit."""

RESUMED_WINDOW: Final = ACK_EVERY
"""Initial window after a reconnect. One acknowledgement covers this many messages."""

MAX_WINDOW: Final = 512
"""Upper bound of the window. This many messages may follow a rejected one before the server closes the connection."""

MAX_REMEMBERED: Final = 256
"""Number of accepted messages with a remembered event, in case the server rejects one later."""

SEQ_BYTES: Final = len(f',"seq":{MAX_SEQ}')
"""Maximum size of the sequence number in a frame, in bytes."""


class PendingMessage:
    """One message, encoded once when it is queued, even if it is sent several times.

    Args:
        type_: `msg` or `reply`.
        data: The payload: bytes, or data that can be encoded as JSON.
        fields: The other fields of its frame.

    Attributes:
        seq: Sequence number; 0 until it is sent for the first time.
        sent_at: Time at which it was last sent or scheduled to be sent again, on the monotonic clock.
        type: `msg` or `reply`.
        size: Size of its frame without the number, in bytes.
        done: Future that completes when the server has accepted the message.

    Raises:
        ValueError: The data cannot be encoded as JSON that the server accepts, a name is invalid, or the fields are too
            large for a binary frame.
    """

    __slots__ = ("_encoded", "_fields", "done", "sent_at", "seq", "size", "type")

    def __init__(self, type_: str, data: Any, fields: dict[str, Any]) -> None:
        self.seq = 0
        self.sent_at = 0.0
        self.type = type_
        self._fields = fields
        self._encoded: str | bytes  # bytes data itself, or the part of a text frame after the number
        if isinstance(data, (bytes, bytearray, memoryview)):
            self._encoded = bytes(data)
            # The largest number checks now, instead of when it is sent, whether the fields fit.
            validate_frame(b"", fields)
            self.size = len(envelope(type_, b"", seq=MAX_SEQ, **fields)) - SEQ_BYTES + len(self._encoded)
        else:
            text = str(validate_frame(envelope(type_, data, **fields), fields))
            self._encoded = text[len(_head(type_)) :]
            self.size = len(text) if text.isascii() else len(text.encode("utf-8"))
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def frame(self) -> str | bytes:
        """Return the frame with its number."""
        if isinstance(self._encoded, bytes):
            return envelope(self.type, self._encoded, seq=self.seq, **self._fields)
        return f'{_head(self.type)},"seq":{self.seq}{self._encoded}'

    @property
    def event(self) -> str | None:
        """The event of the message."""
        event: str | None = self._fields.get("event")
        return event

    @property
    def is_accepted(self) -> bool:
        """Whether the server has accepted the message."""
        return self.done.done() and not self.done.cancelled() and self.done.exception() is None

    def renew(self) -> None:
        """Replace the future by a new one, because an accepted message is sent again in another session."""
        self.done = asyncio.get_running_loop().create_future()

    def accept(self) -> None:
        """Complete the future: the server has accepted the message."""
        if not self.done.done():
            self.done.set_result(None)

    def fail(self, error: Exception) -> None:
        """Fail the future: the acceptance will never be known."""
        if not self.done.done():
            self.done.set_exception(error)
            self.done.exception()  # avoid asyncio's warning if the future is never awaited


def validate_frame(frame: str | bytes, fields: dict[str, Any]) -> str | bytes:
    """Return a frame after checking that the server accepts it. An invalid one would end the session.

    Raises:
        ValueError: The frame contains an invalid name, or JSON beyond the limits.
    """
    for field in ("event", "key", "re"):
        name = fields.get(field)
        if name is not None and not is_name(name):
            raise ValueError(f"{field} must have {NAME_RULE}")
    if isinstance(frame, str):
        check_json(frame)
    return frame


def _head(type_: str) -> str:
    """Return the start of a text frame, which the number follows."""
    return f'{{"type":"{type_}"'


class SendBuffer:
    """Messages that the server has not accepted yet: sent and unsent ones.

    Args:
        max_messages: Maximum number of messages.
        max_bytes: Maximum size of all messages in bytes.
        overflow: Policy for further messages: `"reject"` raises, `"drop_oldest"` drops the oldest unsent message.

    Attributes:
        max_frame: Largest frame that the server accepts, in bytes.
        ready: Event that is set when there may be something to send. The writer of the connection waits for it.
    """

    def __init__(self, max_messages: int, max_bytes: int, overflow: Literal["reject", "drop_oldest"]) -> None:
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._drop_oldest = overflow == "drop_oldest"
        self.max_frame = NO_LIMIT
        self.ready = asyncio.Event()
        self._closed: ClientError | None = None
        self._next = 1
        self._sent: deque[PendingMessage] = deque()  # sent on this or an earlier connection, with a number
        self._to_resend: deque[PendingMessage] = deque()  # the part of them that this connection has not sent yet
        self._unsent: deque[PendingMessage] = deque()  # never sent
        self._bytes = 0
        self._window = FIRST_WINDOW
        self._accepted: deque[tuple[int, str | None]] = deque(maxlen=MAX_REMEMBERED)

    def __len__(self) -> int:
        return len(self._sent) + len(self._unsent)

    @property
    def oldest_sent(self) -> PendingMessage | None:
        """The oldest sent message without an acknowledgement."""
        return self._sent[0] if self._sent else None

    def unaccepted_futures(self) -> list[asyncio.Future[None]]:
        """Return the futures of all unaccepted messages."""
        return [message.done for message in (*self._sent, *self._unsent)]

    def add(self, message: PendingMessage) -> None:
        """Add a message.

        Raises:
            ClientClosedError: The client is closed.
            MessageTooLargeError: The message is larger than the server accepts.
            BufferFullError: The buffer is full.
        """
        if self._closed is not None:
            raise self._closed
        if message.size + SEQ_BYTES > self.max_frame:
            raise MessageTooLargeError(message.size, self.max_frame)
        while len(self) >= self._max_messages or (len(self) and self._bytes + message.size > self._max_bytes):
            if not self._drop_oldest or not self._unsent:
                raise BufferFullError
            self._fail_message(self._unsent.popleft(), BufferFullError())
        self._unsent.append(message)
        self._bytes += message.size
        self.ready.set()

    def cancel(self, message: PendingMessage) -> bool:
        """Remove an unsent message; return `False` if it was sent."""
        if message not in self._unsent:
            return False
        self._unsent.remove(message)
        self._bytes -= message.size
        return True

    def pop_next(self) -> PendingMessage | None:
        """Return the next message to send, with its number; `None` if there is none.

        It also returns `None` while the window of unacknowledged messages is full.
        """
        if len(self._sent) - len(self._to_resend) >= self._window:
            return None
        while self._to_resend:
            message = self._to_resend.popleft()
            if self._sent and message.seq >= self._sent[0].seq:  # otherwise the server has accepted it
                message.sent_at = monotonic()
                return message
        fresh = self._next_unsent()
        if fresh is None:
            return None
        fresh.seq, fresh.sent_at = self._next, monotonic()
        self._next += 1
        self._sent.append(fresh)
        return fresh

    def _next_unsent(self) -> PendingMessage | None:
        """Return the next unsent message. Messages that are too large for the server fail."""
        while self._unsent:
            message = self._unsent.popleft()
            if message.size + SEQ_BYTES <= self.max_frame:
                return message
            self._fail_message(message, MessageTooLargeError(message.size, self.max_frame))
        return None

    def acknowledge(self, seq: int) -> None:
        """Accept all messages up to a number."""
        while self._sent and self._sent[0].seq <= seq:
            message = self._sent.popleft()
            self._bytes -= message.size
            self._window = min(self._window + 1, MAX_WINDOW)
            self._accepted.append((message.seq, message.event))
            message.accept()
        self.ready.set()  # the window may have grown

    def retry_from(self, seq: int) -> bool:
        """Send a message and all later ones again, because the server has rejected it for some time.

        The server ignores the messages after the rejected one. The window starts at one message and grows as the server
        accepts them.

        Returns:
            Whether there is such a message.
        """
        if not self._sent or not self._sent[0].seq <= seq <= self._sent[-1].seq:
            return False
        self._to_resend = deque(message for message in self._sent if message.seq >= seq)
        self._window = len(self._sent) - len(self._to_resend) + 1
        return True

    def reduce_window(self) -> None:
        """Reduce the window to one message, because the server has closed the connection over its rate limit."""
        self._window = 1

    def on_rejected(self, seq: int, error: Exception) -> str | None:
        """Fail a message that the server has accepted and then rejected, if it is still unresolved.

        Returns:
            The event of the message, if it is known.
        """
        for message in self._sent:
            if message.seq == seq:
                message.fail(error)
                return message.event
        return next((event for number, event in self._accepted if number == seq), None)

    def resume(self, accepted: int) -> None:
        """Continue the session on a new connection, and send unaccepted messages again."""
        self.acknowledge(accepted)
        self._window = min(self._window, RESUMED_WINDOW)
        self._next = max(self._next, accepted + 1)
        self._to_resend = deque(self._sent)
        now = monotonic()
        for message in self._to_resend:
            message.sent_at = now

    def restart_session(
        self, accepted: int, *, replay: bool, again: Iterable[PendingMessage] = ()
    ) -> list[PendingMessage]:
        """Start a new session. Messages of the old one fail, or are sent again with new numbers.

        Replies fail, sent or not, because the requests ended with the old session. In the new session another request
        may have the same id.

        Args:
            accepted: Number of the last message that the server has accepted in the new session.
            replay: Whether unaccepted messages of the old session are sent again.
            again: Accepted messages of the old session that are sent again before all others.

        Returns:
            The messages that failed.
        """
        before, self._sent, self._to_resend = self._sent, deque(), deque()
        if before:
            self._window = min(self._window, RESUMED_WINDOW)
        self._next = accepted + 1
        self._accepted.clear()
        failed = [message for message in before if not replay or message.type == "reply"]
        failed += [message for message in self._unsent if message.type == "reply"]
        again = tuple(again)
        self._bytes += sum(message.size for message in again)
        replayed = (*again, *before) if replay else again
        self._unsent = deque(message for message in (*replayed, *self._unsent) if message.type != "reply")
        for message in failed:
            self._fail_message(message, SessionLostError())
        return failed

    def close(self, error: ClientError) -> None:
        """Fail all messages, and reject further ones with the same error."""
        self._closed = error
        for message in (*self._sent, *self._unsent):
            message.fail(error)
        self._sent.clear()
        self._to_resend.clear()
        self._unsent.clear()
        self._bytes = 0

    def _fail_message(self, message: PendingMessage, error: ClientError) -> None:
        self._bytes -= message.size
        message.fail(error)
