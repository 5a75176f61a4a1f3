"""Start of `stabilizer.v1.json`: offered subprotocols, the first frame, and the outcome of a resume. No I/O."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from enum import Enum

from fastapi_ws_stabilizer.wire.v1.frames import (
    AUTH_PREFIX,
    DEFLATE_CAP,
    MAX_HELLO_BYTES,
    MAX_RESUME_TOKEN_CHARS,
    RETRY_CAP,
    VERSION,
    ProtocolError,
    is_longer,
    optional_identifier,
    optional_text,
    parse,
    require_int,
)


def offered_credential(subprotocols: Iterable[str]) -> str | None:
    """Return the credential in the client's subprotocols; `None` without a readable one."""
    for offered in subprotocols:
        if offered.startswith(AUTH_PREFIX):
            text = offered[len(AUTH_PREFIX) :]
            try:
                return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode("utf-8")
            except ValueError:  # includes binascii.Error and UnicodeError
                return None
    return None


class ResumeOutcome(str, Enum):
    """Outcome of a resume request."""

    NONE = "none"
    """The client asked for no session and got a new one."""
    FULL = "full"
    """The client got its session and every message that it missed."""
    GAP = "gap"
    """The client got its session with rooms and user data, but missed messages are lost. The welcome says so."""
    LOST = "lost"
    """The client got a new session: the old one is unknown here, ended, or belongs to another client."""


class Hello:
    """First frame of a client.

    Attributes:
        attempt: Number of this connection attempt of the client instance, starting at 1.
        token: Resume token of the session to resume; `None` for a new session.
        seq: Sequence number of the last message of that session that the client has processed.
        auth: The credential, if the client sends one.
        instance: Id of the client instance, if the client sends one.
        deflates: Whether the client accepts and sends compressed frames.
        retries: Whether the client sends a message again if the server rejects it with a retry time.
    """

    __slots__ = ("attempt", "auth", "deflates", "instance", "retries", "seq", "token")

    def __init__(
        self,
        attempt: int,
        token: str | None,
        seq: int,
        auth: str | None,
        instance: str | None = None,
        *,
        deflates: bool = False,
        retries: bool = False,
    ) -> None:
        self.instance = instance
        self.deflates = deflates
        self.retries = retries
        self.attempt = attempt
        self.token = token
        self.seq = seq
        self.auth = auth

    def __repr__(self) -> str:  # contains neither the token nor the credential
        return f"<Hello attempt={self.attempt} seq={self.seq} resumes={self.token is not None}>"


def parse_hello(raw: str | bytes) -> Hello:
    """Parse the first frame of a client.

    Raises:
        ProtocolError: The frame is not a hello, is too large, or has an unsupported version.
    """
    if isinstance(raw, bytes) or is_longer(raw, MAX_HELLO_BYTES):
        raise ProtocolError(f"the first frame must be a hello of at most {MAX_HELLO_BYTES} bytes")
    frame = parse(raw)
    if frame["type"] != "hello":
        raise ProtocolError("the first frame must be a hello")
    if require_int(frame, "v") != VERSION:
        raise ProtocolError(f"this server supports version {VERSION}", code=4406)
    resume = frame.get("resume")
    if resume is None:
        token, seq = None, 0
    else:
        if not isinstance(resume, dict):
            raise ProtocolError("hello: resume must be an object")
        resume = {**resume, "type": "hello.resume"}  # error messages use it
        token = optional_text(resume, "token", MAX_RESUME_TOKEN_CHARS)
        if token is None:
            raise ProtocolError("hello: resume must have a token")
        seq = require_int(resume, "seq")
    auth, instance = optional_text(frame, "auth", MAX_HELLO_BYTES), optional_identifier(frame, "client")
    caps = frame.get("caps")
    if caps is not None and not isinstance(caps, list):
        raise ProtocolError("hello: caps must be a list")
    deflates, retries = (cap in (caps or ()) for cap in (DEFLATE_CAP, RETRY_CAP))
    return Hello(require_int(frame, "n"), token, seq, auth, instance, deflates=deflates, retries=retries)
