"""The beginning of `stabilizer.v1.json`: the offered subprotocols, and the first frame of a client. No I/O."""

from __future__ import annotations

import base64
from collections.abc import Iterable

from fastapi_ws_stabilizer.wire.v1.frames import (
    AUTH_PREFIX,
    DEFLATE_CAP,
    MAX_HELLO_BYTES,
    MAX_RESUME_TOKEN_CHARS,
    RETRY_CAP,
    SUBPROTOCOL,
    VERSION,
    ProtocolError,
    is_longer,
    optional_identifier,
    optional_text,
    parse,
    require_int,
)


def offers_v1(subprotocols: Iterable[str]) -> bool:
    """Whether a client offers to speak it."""
    return SUBPROTOCOL in subprotocols


def offered_credential(subprotocols: Iterable[str]) -> str | None:
    """The credential that a client has put among its subprotocols; `None` if there is none that can be read."""
    for offered in subprotocols:
        if offered.startswith(AUTH_PREFIX):
            text = offered[len(AUTH_PREFIX) :]
            try:
                return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode("utf-8")
            except ValueError:  # binascii.Error and UnicodeError are such
                return None
    return None


class Hello:
    """The first frame of a client.

    Attributes:
        dial: How often this client instance has dialled, this time included.
        token: The token of the session that it wants back, if it wants one.
        seq: Number of the last message of that session that it has processed.
        auth: Its credential, if it sends one.
        instance: What tells this client instance from others, if it says so.
        deflates: Whether it takes and sends compressed frames.
        retries: Whether it sends a message again that was refused with a time.
    """

    __slots__ = ("attempt", "auth", "deflates", "instance", "retries", "seq", "token")

    def __init__(
        self,
        dial: int,
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
        self.attempt = dial
        self.token = token
        self.seq = seq
        self.auth = auth

    def __repr__(self) -> str:  # neither the token nor the credential
        return f"<Hello dial={self.attempt} seq={self.seq} resumes={self.token is not None}>"


def parse_hello(raw: str | bytes) -> Hello:
    """Read the first frame of a client.

    Raises:
        ProtocolError: It is no hello, is too long, or is of a version that is not spoken here.
    """
    if isinstance(raw, bytes) or is_longer(raw, MAX_HELLO_BYTES):
        raise ProtocolError(f"the first frame is a hello of at most {MAX_HELLO_BYTES} bytes")
    frame = parse(raw)
    if frame["type"] != "hello":
        raise ProtocolError("the first frame is a hello")
    if require_int(frame, "v") != VERSION:
        raise ProtocolError(f"version {VERSION} is spoken here", code=4406)
    resume = frame.get("resume")
    if resume is None:
        token, seq = None, 0
    else:
        if not isinstance(resume, dict):
            raise ProtocolError("hello: resume is an object")
        resume = {**resume, "type": "hello.resume"}  # what an error names
        token = optional_text(resume, "token", MAX_RESUME_TOKEN_CHARS)
        if token is None:
            raise ProtocolError("hello: resume needs a token")
        seq = require_int(resume, "seq")
    auth, instance = optional_text(frame, "auth", MAX_HELLO_BYTES), optional_identifier(frame, "client")
    caps = frame.get("caps")
    if caps is not None and not isinstance(caps, list):
        raise ProtocolError("hello: caps is a list")
    deflates, retries = (cap in (caps or ()) for cap in (DEFLATE_CAP, RETRY_CAP))
    return Hello(require_int(frame, "n"), token, seq, auth, instance, deflates=deflates, retries=retries)
