"""Errors of the Python client, all subclasses of `ClientError`.

`docs/reference/errors.md` lists them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fastapi_ws_stabilizer.errors import RequestError, WebSocketStabilizerError

MAX_BODY_CHARS: Final = 200
"""Maximum number of characters of a server's text that an error shows."""


@dataclass(frozen=True)
class HttpRejection:
    """HTTP response of a server that rejected a handshake.

    Attributes:
        status: HTTP status.
        body: Start of the body as one line, at most 200 characters.
    """

    status: int
    body: str

    @classmethod
    def from_response(cls, status: int, body: bytes | bytearray) -> HttpRejection:
        """Return the rejection in a response."""
        return cls(status, shortened(body.decode("utf-8", "replace")))


def shortened(text: str) -> str:
    """Return the start of a text of the server as one line of at most 200 printable characters."""
    start = text[: 4 * MAX_BODY_CHARS]  # more than one character may become one space
    line = " ".join("".join(char if char.isprintable() else " " for char in start).split())
    is_cut = len(line) > MAX_BODY_CHARS or len(text) > len(start)
    return f"{line[: MAX_BODY_CHARS - 1]}…" if is_cut else line


def close_text(code: int, reason: str, rejection: HttpRejection | None = None) -> str:
    """Return a close code, its reason and the body of a rejection as text for people."""
    details = [reason] if reason else []
    if rejection is not None and rejection.body:
        details.append(f"the server says: {rejection.body}")
    return f"code {code} ({'; '.join(details)})" if details else f"code {code}"


class ClientError(WebSocketStabilizerError):
    """Base of all errors of the Python client."""


class ClientClosedError(ClientError):
    """The client is closed and does not reconnect.

    Attributes:
        code: The final close code; 1000 after your own `close()`.
        reason: The close reason.
        rejection: The HTTP response with its `status` and the start of its `body`, if the server rejected the
            handshake; otherwise `None`.
    """

    def __init__(self, code: int, reason: str = "", rejection: HttpRejection | None = None) -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason
        self.rejection = rejection

    def __str__(self) -> str:
        return f"the client is permanently closed: {close_text(self.code, self.reason, self.rejection)}"


class NotStartedError(ClientError, RuntimeError):
    """The client was created but not started, so it would never receive a message."""

    def __str__(self) -> str:
        return (
            "the client is not started: write `async with connect(url) as client:`, or call `client.start()` first "
            "and `await client.close()` at the end"
        )


class SessionLostError(ClientError):
    """The server has lost the session. The message was sent but not acknowledged, so the server may have handled it.

    With `replay_on_lost=True` the client sends such messages again. Their idempotency key prevents a server that has
    handled them from handling them twice.
    """

    def __str__(self) -> str:
        return "the session is lost, and it is unknown whether the server has handled this message"


class BufferFullError(ClientError):
    """The buffer of unsent and unacknowledged messages is full, or a newer message replaced this one."""

    def __str__(self) -> str:
        return "the send buffer is full: send less, await the future of send(), or raise max_buffered"


class MessageTooLargeError(ClientError):
    """The message is larger than the server accepts.

    Attributes:
        size: Size of the message in bytes.
        limit: Maximum size that the server accepts, in bytes.
    """

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(size, limit)
        self.size = size
        self.limit = limit

    def __str__(self) -> str:
        return f"the message has {self.size} bytes, but the server accepts {self.limit}"


class UnreadableFrameError(ClientError):
    """The server sent a frame that this client cannot read. The client skips it and continues.

    Attributes:
        why: What is wrong with the frame.
    """

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why

    def __str__(self) -> str:
        return f"the client skipped an unreadable frame of the server: {self.why}"


class RefusedError(ClientError, RequestError):
    """The server rejected a message, and no handler got it.

    Attributes:
        code: The server's error code, such as `unknown_type` or `invalid_message`.
        message: Text for people.
        seq: Sequence number of the message; `None` if it had none.
        event: Event of the message; `None` if it had none, or the client no longer knows it.
    """

    def __init__(self, code: str, message: str, seq: int | None = None, event: str | None = None) -> None:
        RequestError.__init__(self, code, message)
        self.seq = seq
        self.event = event

    def __str__(self) -> str:
        which = "" if self.seq is None else f" (message {self.seq}"
        if which:
            which += ")" if self.event is None else f", event {self.event!r})"
        return f"{RequestError.__str__(self)}{which}"
