"""Session of a client with its server: everything that outlives a connection."""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass
from typing import Any, Final

from pydantic_core import to_json

from fastapi_ws_stabilizer.client.errors import ClientClosedError, RefusedError, UnreadableFrameError
from fastapi_ws_stabilizer.client.events import ClientEvents, Gap, logger
from fastapi_ws_stabilizer.client.inbound import InboundMessages
from fastapi_ws_stabilizer.client.requests import PendingRequests
from fastapi_ws_stabilizer.client.send_buffer import SendBuffer
from fastapi_ws_stabilizer.tasks import TaskSet
from fastapi_ws_stabilizer.wire.v1.frames import (
    DEFLATE_CAP,
    RETRY_CAP,
    VERSION,
    ProtocolError,
    optional_int,
    optional_text,
    require_int,
)

MAX_TRUNCATIONS: Final = 2
"""Number of connections that may be lost during the same message before the client skips it. The server sends the
message again on each connection."""


@dataclass(frozen=True)
class Welcome:
    """Server's answer to a hello.

    Attributes:
        outcome: Outcome of the resume: `none`, `full`, `gap` or `lost`.
        why: Cause of a gap or of a lost session.
        session: Id of the session.
        token: Token that resumes it.
        seq: Number of the message before the next one that the server sends.
        accepted: Number of the last message of the client that the server has accepted.
        max_frame: Largest frame that the server accepts, in bytes; `None` if it names none.
        ping_interval: Seconds between the server's pings; 0 without pings.
        ping_timeout: Seconds after a ping until the server expects the pong.
        deflates: Whether the server accepts compressed frames.
    """

    outcome: str
    why: str | None
    session: str
    token: str
    seq: int
    accepted: int
    max_frame: int | None
    ping_interval: float
    ping_timeout: float
    deflates: bool

    @classmethod
    def from_frame(cls, frame: dict[str, Any]) -> Welcome:
        """Return the content of a welcome frame.

        Raises:
            ProtocolError: A field is missing or invalid.
        """
        outcome, caps = frame.get("resume"), frame.get("caps")
        token, session = optional_text(frame, "token", 512), optional_text(frame, "session")
        if token is None or session is None or outcome not in ("none", "full", "gap", "lost"):
            raise ProtocolError("welcome: token, session or resume is missing or invalid")
        return cls(
            outcome=outcome,
            why=optional_text(frame, "why"),
            session=session,
            token=token,
            seq=require_int(frame, "seq"),
            accepted=require_int(frame, "ack"),
            max_frame=optional_int(frame, "max", least=1),
            ping_interval=require_int(frame, "ping") / 1000,
            ping_timeout=require_int(frame, "timeout") / 1000,
            deflates=isinstance(caps, list) and DEFLATE_CAP in caps,
        )


class ClientSession:
    """Session of a client: its messages in both directions, its requests and its numbers.

    Args:
        tasks: Task set for handlers.
        events: Listeners of the client.
        buffer: Messages to send.
        replays: Whether messages of a lost session are sent again in the new one.

    Attributes:
        events: Listeners of the client.
        buffer: Messages that the server has not accepted yet.
        requests: Requests that the server has not answered yet.
        inbound: Received messages.
        instance_id: Random id of this client.
        id: Id of the session; `None` before the first welcome.
        token: Token for the next resume. Without it the next hello asks for a new session.
        last_seq: Number of the last received message.
        attempts: Number of hellos that were sent.
        unreadable_frames: Number of skipped frames.
    """

    def __init__(self, tasks: TaskSet, events: ClientEvents, buffer: SendBuffer, *, replays: bool) -> None:
        self.events: ClientEvents = events
        self.buffer: SendBuffer = buffer
        self.requests: PendingRequests = PendingRequests()
        self.inbound: InboundMessages = InboundMessages(tasks, events, buffer, self.requests)
        self._replays = replays
        self.instance_id: str = secrets.token_hex(8)
        self.id: str | None = None
        self.token: str | None = None
        self.last_seq: int = 0
        self.attempts: int = 0
        self.unreadable_frames: int = 0
        self._rejections = 0
        self._truncated = (0, 0)  # number of the last message before a truncated one, and how often it was truncated

    def hello(self, credential: str | None, *, deflates: bool) -> str:
        """Return the first frame of the next connection.

        Args:
            credential: Credential of the client.
            deflates: Whether the client offers compressed frames.
        """
        self.attempts += 1
        frame: dict[str, Any] = {"type": "hello", "v": VERSION, "n": self.attempts, "client": self.instance_id}
        frame["caps"] = [RETRY_CAP, DEFLATE_CAP] if deflates else [RETRY_CAP]
        if credential is not None:
            frame["auth"] = credential
        if self.token is not None:
            frame["resume"] = {"token": self.token, "seq": self.last_seq}
        return to_json(frame).decode()

    def attach(self, welcome: Welcome) -> str:
        """Continue on a new connection, in the old session or in a new one, and report a gap to `on_gap`.

        Returns:
            The outcome: `none`, `full`, `gap` or `lost`.
        """
        before, outcome, why = self.last_seq, welcome.outcome, welcome.why
        if outcome == "none" and self.id is not None:  # the client has abandoned the old session
            outcome, why = "lost", "given_up"
        self.id, self.token, self.last_seq = welcome.session, welcome.token, welcome.seq
        self.buffer.max_frame = welcome.max_frame or self.buffer.max_frame
        if outcome in ("none", "lost"):
            self._truncated = (0, 0)
            unanswered = self.requests.session_lost(replay=self._replays)
            self.buffer.restart_session(welcome.accepted, replay=self._replays, again=unanswered)
            self.inbound.restart_session()
        else:
            self.buffer.resume(welcome.accepted)
        if outcome in ("gap", "lost"):
            lost = outcome == "lost"
            self.events.emit("gap", Gap(lost, why, before + 1, None if lost else welcome.seq))
        return outcome

    def on_unreadable(self, why: str) -> None:
        """Record a frame of the server that cannot be read, and report it to `on_error`."""
        error = UnreadableFrameError(why)
        self.unreadable_frames += 1
        logger.log(logging.WARNING if self.unreadable_frames == 1 else logging.DEBUG, "%s", error)
        self.events.emit("error", error)

    def on_rejected(self, error: RefusedError) -> None:
        """Fail a message that the server has rejected, and report it to `on_error`."""
        if error.seq is not None:
            error.event = self.buffer.on_rejected(error.seq, error)
        self._rejections += 1
        level = logging.WARNING if self._rejections == 1 else logging.INFO
        logger.log(level, "the server has rejected a message: %s", error)
        self.events.emit("error", error)

    def mark_truncated(self) -> None:
        """Record a connection that was lost during a large message of the server.

        The server sends the message again on the next connection. If that fails each time, the message would block all
        later ones forever, so the client finally skips it and reports a gap. The server does not send a volatile
        message again, see `clear_truncated`.
        """
        before, times = self._truncated
        self._truncated = (self.last_seq, times + 1 if before == self.last_seq else 1)
        if self._truncated[1] >= MAX_TRUNCATIONS:
            self.last_seq += 1
            self._truncated = (0, 0)
            self.events.emit("gap", Gap(False, "unfinished", self.last_seq, self.last_seq))

    def clear_truncated(self) -> None:
        """Forget the truncated message, because the server does not send it again."""
        self._truncated = (0, 0)

    def close(self, error: ClientClosedError, *, is_ours: bool) -> None:
        """End the session: everything that waits fails, and nothing more is sent.

        Args:
            error: Error of the client.
            is_ours: Whether your code has closed the client. If so, loops over the messages just end.
        """
        self.token = None
        self.buffer.close(error)
        self.requests.close(error)
        self.inbound.close(None if is_ours else error)
