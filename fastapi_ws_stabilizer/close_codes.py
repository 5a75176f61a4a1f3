"""Close codes, disconnect reasons, and the policy of each reason for messages that are still queued.

Codes below 3000 come from RFC 6455 section 7.4.1 and the IANA registry. 4000 + an HTTP status has the meaning of that
status.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Final

MAX_REASON_BYTES: Final = 123  # RFC 6455 section 5.5: a control frame carries 125 bytes, two of them are the code

SESSION_ENDED: Final = 4410
"""Code that a `stabilizer.v1.json` client gets where a plain client gets 1000."""

SUPERSEDED: Final = 4409
"""Code for a client that a newer connection has replaced. The client gives up its session."""

DETACHED: Final = 4000
"""Code with which a `stabilizer.v1.json` client detaches, because the server asked for it or its page is suspended."""

NO_STATUS: Final = 1005
ABNORMAL: Final = 1006
UNSENDABLE: Final = frozenset({1004, NO_STATUS, ABNORMAL, 1015})


class DisconnectReason(str, Enum):
    """Cause of the end of a connection, identical on every server."""

    COMPLETED = "completed"
    """The endpoint returned."""
    CLIENT_CLOSE = "client_close"
    """The client sent a close frame; the code is the client's."""
    NETWORK_LOST = "network_lost"
    """The connection broke without a close frame. The server sends nothing; hooks get 1006."""
    HEARTBEAT_TIMEOUT = "heartbeat_timeout"
    """The client did not answer a heartbeat within `heartbeat_timeout`."""
    SLOW_CONSUMER = "slow_consumer"
    """The client did not read its messages: a send made no progress, or the outbox was full."""
    SERVER_SHUTDOWN = "server_shutdown"
    """The server is stopping or restarting."""
    REPLACED = "replaced"
    """The same client id connected again. A client with a session gets 4410, unless it opened the newer connection
    itself."""
    LIFETIME = "lifetime"
    """The connection reached `max_lifetime`. The client should reconnect."""
    IDLE = "idle"
    """The connection carried no message for `idle_timeout`. The client may reconnect."""
    MEMORY = "memory"
    """The connection held more than `max_memory_per_connection`, or the server evicted it because of
    `max_total_memory`, with `retry=` in milliseconds. Its session ends."""
    APPLICATION = "application"
    """Your code called `ws.close()` or `manager.disconnect()`, with its own code or 1000."""
    POLICY = "policy"
    """The server rejected the client: an `HTTPException` (4000 + its status), invalid parameters, too many bad
    messages, or a rate limit (4429)."""
    MESSAGE_TOO_BIG = "message_too_big"
    """A message was larger than `max_message_size`."""
    ERROR = "error"
    """A bug: the endpoint, a hook, a handler or a task of the connection raised."""


@dataclass(frozen=True)
class ClosePolicy:
    """Close policy of one cause.

    Attributes:
        code: Default close code.
        reason: Default close reason.
        flush: Whether the server sends queued messages before the close frame.
        deliver: Whether your code can still read received messages.
    """

    code: int
    reason: str
    flush: bool
    deliver: bool


_R = DisconnectReason

CLOSE_POLICIES: Final[dict[DisconnectReason, ClosePolicy]] = {
    _R.COMPLETED: ClosePolicy(1000, "", flush=True, deliver=False),
    _R.CLIENT_CLOSE: ClosePolicy(1000, "", flush=False, deliver=True),
    _R.NETWORK_LOST: ClosePolicy(ABNORMAL, "", flush=False, deliver=True),
    _R.HEARTBEAT_TIMEOUT: ClosePolicy(4408, "heartbeat timeout", flush=False, deliver=True),
    _R.SLOW_CONSUMER: ClosePolicy(4507, "slow consumer", flush=False, deliver=True),
    _R.SERVER_SHUTDOWN: ClosePolicy(1012, "server shutdown", flush=True, deliver=True),
    _R.REPLACED: ClosePolicy(4409, "replaced by a newer connection", flush=True, deliver=True),
    _R.LIFETIME: ClosePolicy(1001, "maximum lifetime reached", flush=True, deliver=True),
    _R.IDLE: ClosePolicy(1001, "idle", flush=True, deliver=True),
    _R.MEMORY: ClosePolicy(4503, "out of memory", flush=False, deliver=False),
    _R.APPLICATION: ClosePolicy(1000, "", flush=True, deliver=False),
    _R.POLICY: ClosePolicy(1008, "policy violation", flush=True, deliver=False),
    _R.MESSAGE_TOO_BIG: ClosePolicy(1009, "message too big", flush=True, deliver=True),
    _R.ERROR: ClosePolicy(1011, "internal error", flush=True, deliver=False),
}


@dataclass(frozen=True)
class CloseInfo:
    """Cause, code and reason of the end of one connection.

    Attributes:
        cause: Why the connection closed.
        code: Close code that was sent or received; 1005 or 1006 if there was none on the wire.
        reason: Close reason that was sent or received, at most 123 bytes.
        by_peer: Whether the client, the network or the server ended the connection, so that nothing can be sent.
        rooms: The rooms that the connection was in.
        from_outside: Whether a call on the manager or a room ended the connection, instead of its own endpoint.
    """

    cause: DisconnectReason
    code: int
    reason: str = ""
    by_peer: bool = False
    rooms: tuple[str, ...] = field(default=(), compare=False, repr=False)
    from_outside: bool = field(default=False, compare=False, repr=False)

    @property
    def policy(self) -> ClosePolicy:
        """The close policy of the cause."""
        return CLOSE_POLICIES[self.cause]


def local_close(
    cause: DisconnectReason, *, code: int | None = None, reason: str | None = None, from_outside: bool = False
) -> CloseInfo:
    """Return the close info of a close by this side, with the policy's code and text as defaults.

    Raises:
        ValueError: RFC 6455 does not allow `code` in a close frame.
    """
    policy = CLOSE_POLICIES[cause]
    return CloseInfo(
        cause,
        policy.code if code is None else check_close_code(code),
        truncate_reason(policy.reason if reason is None else reason),
        from_outside=from_outside,
    )


def remote_close(code: int, reason: str | None, *, close_frame: bool) -> CloseInfo:
    """Return the close info of a disconnect that the ASGI server reports.

    Args:
        code: The code of the ASGI `websocket.disconnect` event.
        reason: The reason of that event, if it has one.
        close_frame: Whether the client sent a close frame. The code does not show it: uvicorn reports 1005 for a lost
            network, and hypercorn 1006 for a clean close.
    """
    if close_frame:
        cause = DisconnectReason.CLIENT_CLOSE
        code = NO_STATUS if code == ABNORMAL else code
    elif code == CLOSE_POLICIES[_R.SERVER_SHUTDOWN].code:
        cause = DisconnectReason.SERVER_SHUTDOWN
    elif code == CLOSE_POLICIES[_R.MESSAGE_TOO_BIG].code:
        cause = DisconnectReason.MESSAGE_TOO_BIG
    elif code in _BY_SERVER_FOR_BAD_FRAMES:
        cause = DisconnectReason.POLICY
    else:
        cause = DisconnectReason.NETWORK_LOST
        code = ABNORMAL if code == NO_STATUS else code
    return CloseInfo(cause, code, truncate_reason(reason or ""), by_peer=True)


def detaches(close_info: CloseInfo) -> bool:
    """Return whether the client closed with the code that detaches its session.

    1005 also detaches, because hypercorn does not report the close codes of clients.
    """
    by_client = close_info.by_peer and close_info.cause is DisconnectReason.CLIENT_CLOSE
    return by_client and close_info.code in (DETACHED, NO_STATUS)


_BY_SERVER_FOR_BAD_FRAMES: Final = frozenset({1002, 1003, 1007, 1010})
"""Codes with which an ASGI server closes a connection after a protocol violation of the client."""

SERVER_CODES: Final = frozenset({1009, 1012}) | _BY_SERVER_FOR_BAD_FRAMES
"""Codes that are attributed to the ASGI server if it is unknown whether the client sent them."""


def ends_session(close_info: CloseInfo) -> bool:
    """Return whether this close ends the session, because the client will not reconnect to it."""
    if close_info.by_peer and close_info.cause is DisconnectReason.CLIENT_CLOSE:
        return close_info.code == 1000
    if close_info.cause is DisconnectReason.MEMORY:
        return True  # a detached session would still hold the memory
    return close_info.code in (1000, SUPERSEDED, SESSION_ENDED) or is_terminal(close_info.code)


_BACK_AFTER: Final = frozenset({4401, 4408, 4409, 4412, 4429})
"""Codes from 4400 to 4499 after which a client still reconnects."""


def is_terminal(code: int) -> bool:
    """Return whether a `stabilizer.v1.json` client must not reconnect after a close code.

    1008 is not terminal, because it can be about credentials, which the client can renew.
    """
    return code in (1002, 1003, 1007, 1009, 1010, 3003) or (4400 <= code < 4500 and code not in _BACK_AFTER)


def check_close_code(code: int) -> int:
    """Return `code` if an endpoint may send it in a close frame.

    Raises:
        ValueError: RFC 6455 section 7.4 does not allow it.
    """
    allowed = isinstance(code, int) and (1000 <= code <= 1014 or 3000 <= code <= 4999) and code not in UNSENDABLE
    if not allowed:
        raise ValueError(
            f"close code {code!r} cannot be sent: use 1000 to 1003, 1007 to 1014 or 3000 to 4999 "
            "(for your own meanings 4000 to 4999, without the codes of this library)"
        )
    return code


def truncate_reason(text: str) -> str:
    """Truncate a close reason to the 123 bytes of a close frame, at a character boundary."""
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= MAX_REASON_BYTES:
        return encoded.decode("utf-8")
    return encoded[:MAX_REASON_BYTES].decode("utf-8", "ignore")
