"""Server side of `stabilizer.v1.json` for one connection: numbers, acknowledgements, pings.

It is between the read pump and the inbox. It passes on application messages once and in order, and handles all other
frames.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable
from typing import Any, Final, Protocol

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.close_codes import CloseInfo, DisconnectReason
from fastapi_ws_stabilizer.config import CompressionMode, HeartbeatType, WebSocketConfig
from fastapi_ws_stabilizer.connection.credential_expiry import CredentialExpiry, to_milliseconds
from fastapi_ws_stabilizer.connection.liveness import Liveness
from fastapi_ws_stabilizer.events import EventBus
from fastapi_ws_stabilizer.sessions.idempotency import IdempotencyCache
from fastapi_ws_stabilizer.sessions.session import Session
from fastapi_ws_stabilizer.sessions.store import ResumeResult
from fastapi_ws_stabilizer.wire.encoded import EncodedMessage
from fastapi_ws_stabilizer.wire.v1.frames import (
    DEFLATE_CAP,
    LONG_TYPES,
    MAX_CONTROL_BYTES,
    VERSION,
    DelayedAcks,
    Message,
    ProtocolError,
    control_frame,
    estimate_parsed_size,
    inflated,
    is_longer,
    message_of,
    optional_identifier,
    optional_int,
    optional_text,
    parse,
    ping_timestamp,
    require_int,
)

ACK_WITHIN: Final = 0.05
"""Maximum seconds until a message is acknowledged. The protocol allows 1 s, but a client that waits for each
acknowledgement before its next message would be slowed down by that much."""


ACK_START: Final = '{"type":"ack","seq":'
ACK_CHARS: Final = len(ACK_START)
MAX_DIGITS: Final = 16

PING_BYTES: Final = 64
"""Upper bound for the bytes of a ping frame."""


class V1Connection(Protocol):
    """Connection as its v1 protocol uses it."""

    config: WebSocketConfig
    events: EventBus
    liveness: Liveness
    close_info: CloseInfo | None
    socket: Any
    used: bool
    watches_input: bool

    @property
    def outbox(self) -> Any:
        """Outbox of the connection."""

    def answer(self, frame: EncodedMessage) -> None:
        """Send a control frame ahead of queued messages."""

    def close(
        self,
        cause: DisconnectReason,
        *,
        code: int | None = None,
        reason: str | None = None,
        from_outside: bool = False,
    ) -> bool:
        """Close the connection from the server's side."""

    def on_control_frame(self) -> None:
        """Count an unsolicited control frame of the client. Too many close the connection."""

    def admit_message(self, raw: str | bytes, message: Message | None = None) -> bool:
        """Return whether the client may send a message now. If not, send an error frame or close the connection."""

    def on_early_message(self, raw: str | bytes) -> None:
        """Ignore a message that follows a rejected one. Too many of them close the connection."""

    def on_message(self) -> None:
        """Report a received message to the memory budget."""

    def evict(self) -> None:
        """Close the connection because the memory limit of the server is reached."""

    def on_limit_exceeded(self, held: int) -> None:
        """Close the connection because it exceeds `max_memory_per_connection`."""

    def emit(self, event: str, level: int, **fields: Any) -> None:
        """Emit an event about this connection."""


class V1Protocol:
    """Server side of `stabilizer.v1.json` for one connection.

    Args:
        connection: The connection.
        resume_result: Result of the client's hello.
        idempotency: Cache of handled idempotency keys.
        on_renewal: Called with a credential that the client sends later.

    Attributes:
        session: Session of the connection. Another connection can take it over, see `is_current`.
        resume_result: Result of the client's hello.
        credential: Expiry of the client's credential.
        max_inflated: Maximum bytes of a decompressed frame; 0 if compressed frames were not negotiated.
    """

    __slots__ = (
        "_ack_request",
        "_acknowledged",
        "_acks",
        "_connection",
        "_idempotency",
        "_rejected_seq",
        "credential",
        "max_inflated",
        "resume_result",
        "session",
    )

    def __init__(
        self,
        connection: V1Connection,
        resume_result: ResumeResult,
        idempotency: IdempotencyCache,
        on_renewal: Callable[[str | None], None],
    ) -> None:
        self.session: Session = resume_result.session
        self.resume_result = resume_result
        self._connection = connection
        self._idempotency = idempotency
        compresses = resume_result.deflates and connection.config.compression is CompressionMode.DEFLATE
        self.max_inflated = connection.config.max_message_size if compresses else 0
        # Number of the message that the client must send again; 0 for none, -1 if the client cannot do that.
        self._rejected_seq = 0 if resume_result.retries else -1
        self._acknowledged = -1  # the highest number that the client acknowledged on this connection
        self._acks = DelayedAcks(ACK_WITHIN)
        self._ack_request: asyncio.Handle | None = None
        self.credential = CredentialExpiry(connection, on_renewal)

    def welcome(self) -> EncodedMessage:
        """Return the frame that answers the hello, with a new token."""
        config, session, resume_result = self._connection.config, self.session, self.resume_result
        beats = config.heartbeat_type is not HeartbeatType.OFF
        return control_frame(
            "welcome",
            v=VERSION,
            session=session.connection_id,
            token=session.new_token(),
            resume=resume_result.outcome.value,
            why=resume_result.why,
            seq=resume_result.cursor,
            ack=session.accepted,
            ping=to_milliseconds(config.heartbeat_interval) if beats else 0,
            timeout=to_milliseconds(config.heartbeat_timeout) if beats else 0,
            ttl=to_milliseconds(config.session_ttl) if config.enable_reconnect else 0,
            max=config.max_message_size,
            caps=[DEFLATE_CAP] if self.max_inflated else [],
        )

    @property
    def is_current(self) -> bool:
        """Whether no other connection has taken over the session. Afterwards all received frames are ignored."""
        return self.session.connection is self._connection

    def close(self) -> None:
        """Cancel timers when the connection closes."""
        self._acks.reset()
        if self._ack_request is not None:
            self._ack_request.cancel()

    # ── receiving ──

    def receive(self, raw: str | bytes) -> Message | None:
        """Handle a frame. Return its message if it is for user code."""
        session = self.session
        if not self.is_current:
            return None
        if (
            raw[:ACK_CHARS] == ACK_START and raw[-1] == "}"
        ):  # the most frequent frame, as written by this project's clients
            digits = raw[ACK_CHARS:-1]
            plain = digits.isascii() and digits.isdigit() and digits[0] != "0" and len(digits) < MAX_DIGITS
            if plain and session.acknowledge(seq := int(digits)):
                session.confirm()
                self._count_ack(seq)
                return None
        try:
            if self.max_inflated:
                raw = inflated(raw, self.max_inflated)
            frame = parse(raw)
            session.confirm()
            kind = frame["type"]
            if kind == "msg":
                return self._message(message_of(frame), raw)
            if kind not in LONG_TYPES and is_longer(raw, MAX_CONTROL_BYTES):
                raise ProtocolError(f"a control frame may have at most {MAX_CONTROL_BYTES} bytes")
            self._handle_control(kind, frame, raw)
        except ProtocolError as problem:
            too_big = problem.code == 1009
            cause = DisconnectReason.MESSAGE_TOO_BIG if too_big else DisconnectReason.POLICY
            self._connection.close(cause, code=problem.code, reason=str(problem))
        return None

    def _message(self, message: Message, raw: str | bytes) -> Message | None:
        if message.seq is not None and not self._is_next(message.seq, raw):
            return None
        watches = self._connection.watches_input
        if watches and not self._connection.admit_message(raw, message):
            return None
        if message.seq is not None:
            self._accept(message.seq)
        if message.key is not None:
            known = self._idempotency.look(self.session.client_id, message.key)
            if known is not None:
                known.answer(self.session, message)
                return None
            self._idempotency.begin(self.session.client_id, message.key)
        self._connection.events.counters.messages_received += 1
        self._connection.used = True
        if message.id is not None and (inbox := self.session.inbox) is not None and inbox.ignored:
            self._connection.events.counters.messages_discarded += 1
            self.on_dropped(message)
            return None
        message.size = sys.getsizeof(raw)
        if isinstance(raw, str) and (message.data.__class__ is dict or message.data.__class__ is list):
            inbox = self.session.inbox
            if inbox is None or not inbox.has_waiting_reader:  # otherwise it is read in this loop iteration
                message.size += estimate_parsed_size(raw)
        if watches:
            self._connection.on_message()
        return message

    def _is_next(self, seq: int, raw: str | bytes) -> bool:
        """Return whether a number is the next one. If not, acknowledge, ignore or close."""
        next_one = self.session.accepted + 1
        if seq == next_one:
            return True
        if seq < next_one:  # sent again, because the acknowledgement did not reach the client
            self._acks.schedule(self._send_ack)
            self._connection.on_control_frame()
        elif self._rejected_seq == next_one:  # sent before the rejection arrived; the client sends it again later
            self._connection.on_early_message(raw)
        else:
            self._connection.close(DisconnectReason.POLICY, code=4412, reason="a message is missing")
        return False

    def _accept(self, seq: int) -> None:
        """Mark a message as accepted, regardless of what its handler does."""
        self.session.accepted = seq
        self._acks.schedule(self._send_ack)

    def _handle_control(self, kind: str, frame: dict[str, Any], raw: str | bytes) -> None:
        session, connection = self.session, self._connection
        if kind not in ("ack", "reply", "pong"):
            connection.on_control_frame()
        if kind == "ack":
            self._acknowledge(seq := require_int(frame, "seq"))
            self._count_ack(seq)
        elif kind == "ping":
            self._acks.reset()
            connection.answer(control_frame("pong", ts=ping_timestamp(frame), ack=session.accepted))
        elif kind == "pong":
            if not connection.liveness.on_pong(monotonic()):
                connection.on_control_frame()
            if (acknowledged := optional_int(frame, "ack")) is not None:
                self._acknowledge(acknowledged)
        elif kind == "reply":
            if self._is_next(seq := require_int(frame, "seq", least=1), raw):
                self._accept(seq)
                if not session.requests.resolve(
                    optional_identifier(frame, "re") or "", frame.get("data"), frame.get("error")
                ):
                    connection.on_control_frame()
        elif kind == "auth":
            token = optional_text(frame, "token", max_chars=8192)
            self.credential.renewal_requested(token)
        elif kind == "hello":
            raise ProtocolError("unexpected second hello")

    def _acknowledge(self, seq: int) -> None:
        if not self.session.acknowledge(seq):
            raise ProtocolError("acknowledged more messages than were sent")

    def _count_ack(self, seq: int) -> None:
        """Count an acknowledgement without a new number as a control frame.

        The number of sent messages limits all others.
        """
        if seq > self._acknowledged:
            self._acknowledged = seq
        else:
            self._connection.on_control_frame()

    # ── sending ──

    def ping(self, now: float) -> bool:
        """Queue a ping after the waiting messages, so that its number verifies the client's count."""
        if not self._send_ping():
            return False
        self._connection.liveness.on_ping_queued(now)
        return True

    def _send_ping(self) -> bool:
        session, outbox = self.session, self._connection.outbox
        if not self.is_current or not outbox.make_room(PING_BYTES):
            return False
        queued: bool = outbox.put(control_frame("ping", seq=session.head))
        return queued

    def request_ack(self) -> None:
        """Request an acknowledgement with a ping, because its pong carries one at once.

        All requests of one loop iteration share one ping.
        """
        if self._ack_request is None:
            self._ack_request = asyncio.get_running_loop().call_soon(self._send_ack_request)

    def _send_ack_request(self) -> None:
        self._ack_request = None
        if self._send_ping():
            self._connection.liveness.on_unmeasured_ping()

    def on_failed(self, message: Message) -> None:
        """Release the idempotency key of a message after its handler failed.

        The message is not handled again in this session, but a later one with the same key is.
        """
        if message.key is not None:
            self._idempotency.fail(self.session.client_id, message.key)

    def on_no_answer(self, message: Message, code: str, text: str) -> None:
        """Handle a handler that ended without a reply. A request gets an error reply, which survives a reconnect."""
        self.on_failed(message)
        if message.id is not None:
            self.session.reply(message.id, error={"code": code, "message": text})

    def on_raw_read(self, message: Message) -> None:
        """Answer a request with an error if user code reads messages directly and cannot reply."""
        if message.id is not None:
            error = {"code": "no_handler", "message": "the endpoint reads messages itself and does not answer requests"}
            self.session.reply(message.id, error=error)

    def on_discarded(self, item: object) -> None:
        """Release the idempotency key of an accepted message that will never be read."""
        if isinstance(item, Message):
            self.on_failed(item)

    def on_dropped(self, message: Message) -> None:
        """Handle an accepted message that the endpoint does not read. A request gets an error reply."""
        self.on_failed(message)
        if message.id is not None:
            self.reject(message, "not_read", "the endpoint does not read messages")

    def on_rate_exceeded(self, message: Message | None, code: str, text: str, wait: float) -> None:
        """Reject a message that exceeds a rate.

        If the client can send it again in order, the error frame says when. The message is not accepted, so nothing is
        lost and the order stays. If a message is a request, or the client cannot send it again, it is accepted. Then a
        request gets an error reply, and any other message is lost.
        """
        seq = None if message is None else message.seq
        if message is None or seq is None or seq <= self.session.accepted:
            self.reject(message, code, text)
        elif self._rejected_seq < 0 or message.id is not None:
            self._accept(seq)
            self.reject(message, code, text)
        else:
            self._rejected_seq = seq
            self._connection.answer(
                control_frame("error", code=code, message=text, seq=seq, retry=to_milliseconds(wait))
            )

    def reject(self, message: Message | None, code: str, text: str) -> None:
        """Inform the client that a message is not handled, with an error reply to a request or an error frame."""
        if message is not None and message.id is not None:
            self.session.reply(message.id, error={"code": code, "message": text})
            return
        seq = None if message is None else message.seq
        self._connection.answer(control_frame("error", code=code, message=text, seq=seq))

    def on_handled(self, message: Message, answer: Any) -> None:
        """Reply to a handled request, and store the reply under the message's idempotency key.

        Raises:
            MessageEncodeError: The reply cannot be encoded as JSON.
        """
        if message.id is not None:
            self.session.reply(message.id, answer)
        if message.key is not None:
            self._idempotency.complete(self.session, message.key, answer if message.id is not None else None)

    def on_interrupted(self, message: Message) -> None:
        """Handle a message after a lost connection has interrupted its handler, which may have done its work.

        A request gets an error reply, which the client receives if it resumes.
        """
        if message.id is not None:
            error = {"code": "interrupted", "message": "the connection was lost while this was handled"}
            self.session.reply(message.id, error=error)
        if message.key is not None:
            self._idempotency.interrupt(self.session.client_id, message.key)

    def _send_ack(self) -> None:
        self._acks.reset()
        if self._connection.close_info is None and self.is_current:
            self._connection.answer(control_frame("ack", seq=self.session.accepted))

    def emit_outcome(self) -> None:
        """Emit the outcome of the client's hello."""
        self._connection.emit(
            "session_attached",
            logging.INFO,
            session_id=self.session.connection_id,
            outcome=self.resume_result.outcome.value,
            why=self.resume_result.why,
        )
