"""What can go wrong in a client.

```
ClientError
├── ClientClosedError    the client is closed for good: by its user, or because the server's answer was final
├── NotStartedError      (also a RuntimeError)  the client was made and not started
├── SessionLostError     the session is gone, and whether the message was handled before is not known
├── BufferFullError      too much waits to be sent
├── MessageTooLargeError a message is larger than the server takes
├── RefusedError         (also a RequestError)  the server has refused a message
└── UnreadableFrameError the server has sent what this client cannot read, and it was left out
```
"""

from __future__ import annotations

from fastapi_ws_stabilizer.errors import RequestError, WebSocketStabilizerError


class ClientError(WebSocketStabilizerError):
    """Base of the errors of a client."""


class ClientClosedError(ClientError):
    """The client is closed for good.

    Attributes:
        code: The close code that was final; 1000 if its user has closed it.
        reason: What came with it.
    """

    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason

    def __str__(self) -> str:
        return f"the client is closed for good: code {self.code}{f' ({self.reason})' if self.reason else ''}"


class NotStartedError(ClientError, RuntimeError):
    """The client was made and not started, so that nothing would ever come."""

    def __str__(self) -> str:
        return (
            "the client is not started: write `async with connect(url) as client:`, or call `client.start()` first "
            "and `await client.close()` at the end"
        )


class SessionLostError(ClientError):
    """The server knows the session no more. The message was sent and not acknowledged: it may have been handled.

    With `replay_on_lost=True` such messages are sent again, with an idempotency key that keeps a server which has
    handled them from doing so twice.
    """

    def __str__(self) -> str:
        return "the session is lost, and it is not known whether this was handled"


class BufferFullError(ClientError):
    """As much as may wait is waiting to be sent or acknowledged, or this message had to go for a newer one."""

    def __str__(self) -> str:
        return "too much waits to be sent: send less, wait for what send() returns, or allow a larger buffer"


class MessageTooLargeError(ClientError):
    """A message is larger than the server takes.

    Attributes:
        size: Its size in bytes.
        limit: What the server takes.
    """

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(size, limit)
        self.size = size
        self.limit = limit

    def __str__(self) -> str:
        return f"the message has {self.size} bytes, and the server takes {self.limit}"


class UnreadableFrameError(ClientError):
    """The server has sent a frame that this client cannot read. The client has left it out and goes on.

    Attributes:
        why: What is wrong with it.
    """

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why

    def __str__(self) -> str:
        return f"a frame of the server was left out, because it cannot be read: {self.why}"


class RefusedError(ClientError, RequestError):
    """The server has refused a message, and no handler has got it.

    Attributes:
        code: Why, as the server's word for it: `unknown_type`, `invalid_message`, ...
        message: Why, in a sentence.
        seq: The number of the message; `None` if it had none.
        event: The event of the message; `None` if it had none, or is forgotten.
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
