"""What one connection of a `stabilizer.v1.json` client says, and what it is owed: numbers, acknowledgements, pings.

It stands between the pump and the inbox. Application messages come out of it once and in order; everything else is
dealt with here.
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
    ACK_EVERY,
    DEFLATE_CAP,
    LONG_TYPES,
    MAX_CONTROL_BYTES,
    VERSION,
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
"""Seconds after which a message is acknowledged at the latest. The protocol allows one; a client that waits for each
message before it sends the next would be slow by as much."""


ACK_START: Final = '{"type":"ack","seq":'
ACK_CHARS: Final = len(ACK_START)
MAX_DIGITS: Final = 16

PING_BYTES: Final = 64
"""More than a ping takes."""


class V1Connection(Protocol):
    """The connection of a conversation."""

    config: WebSocketConfig
    events: EventBus
    liveness: Liveness
    close_info: CloseInfo | None
    socket: Any
    used: bool
    watches_input: bool

    @property
    def outbox(self) -> Any:
        """What waits to be sent."""

    def answer(self, frame: EncodedMessage) -> None:
        """Send a control frame, before what is queued."""

    def close(
        self,
        reason: DisconnectReason,
        *,
        code: int | None = None,
        text: str | None = None,
        from_outside: bool = False,
    ) -> bool:
        """End the connection from our side."""

    def on_control_frame(self) -> None:
        """A control frame of its client has come that we have not asked for. Too many end the connection."""

    def admit_message(self, raw: str | bytes, message: Message | None = None) -> bool:
        """Whether its client may send a message now. If not, it is told so, or its connection ends."""

    def on_early_message(self, raw: str | bytes) -> None:
        """A message has come behind one that was refused, and is not looked at. Too many end the connection."""

    def on_message(self) -> None:
        """A message of its client has come."""

    def evict(self) -> None:
        """End the connection, because room is needed for others."""

    def on_limit_exceeded(self, held: int) -> None:
        """End the connection, because more is held for it than may be."""

    def emit(self, event: str, level: int, **fields: Any) -> None:
        """Report something about this connection."""


class V1Protocol:
    """The v1 side of one connection.

    Args:
        connection: The connection.
        resume_result: What its client's hello has led to.
        idempotency: The idempotency keys that were handled.
        on_renewal: Called with a credential that the client sends later.

    Attributes:
        session: The session that it belongs to, until another connection takes it over.
        resume_result: What the hello has led to.
        credential: How long its client's credential is good.
        max_inflated: Bytes that a compressed frame of the client may hold; 0 if compressed frames were not agreed on.
    """

    __slots__ = (
        "_ack_request",
        "_ack_timer",
        "_acknowledged",
        "_connection",
        "_idempotency",
        "_rejected_seq",
        "_unacknowledged",
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
        self._rejected_seq = (
            0 if resume_result.retries else -1
        )  # the number that its client is to send again, if it can do that
        self._unacknowledged = 0
        self._acknowledged = -1  # the highest number that the client has acknowledged here
        self._ack_timer: asyncio.TimerHandle | None = None
        self._ack_request: asyncio.Handle | None = None
        self.credential = CredentialExpiry(connection, on_renewal)

    def welcome(self) -> EncodedMessage:
        """The frame that answers the hello, with a new token."""
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
        """Whether no other connection has taken the session over. What one that has lost it still says is ignored."""
        return self.session.connection is self._connection

    def close(self) -> None:
        """The connection is over."""
        self._clear_pending_ack()
        if self._ack_request is not None:
            self._ack_request.cancel()

    # ── what comes in ──

    def receive(self, raw: str | bytes) -> Message | None:
        """Deal with a frame; return the message in it if it is one for user code."""
        session = self.session
        if not self.is_current:
            return None
        if raw[:ACK_CHARS] == ACK_START and raw[-1] == "}":  # by far the most frequent one; as our clients write it
            digits = raw[ACK_CHARS:-1]
            plain = digits.isascii() and digits.isdigit() and digits[0] != "0" and len(digits) < MAX_DIGITS
            if plain and session.acknowledged(seq := int(digits)):
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
                raise ProtocolError(f"a control frame has at most {MAX_CONTROL_BYTES} bytes")
            self._handle_control(kind, frame, raw)
        except ProtocolError as problem:
            too_big = problem.code == 1009
            reason = DisconnectReason.MESSAGE_TOO_BIG if too_big else DisconnectReason.POLICY
            self._connection.close(reason, code=problem.code, text=str(problem))
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
            if inbox is None or not inbox.has_waiting_reader:  # else it is read in this turn, and not worth the time
                message.size += estimate_parsed_size(raw)
        if watches:
            self._connection.on_message()
        return message

    def _is_next(self, seq: int, raw: str | bytes) -> bool:
        """Whether a message is the next one."""
        next_one = self.session.accepted + 1
        if seq == next_one:
            return True
        if seq < next_one:  # sent again, because our word did not reach the client
            self._schedule_ack()
            self._connection.on_control_frame()
        elif (
            self._rejected_seq == next_one
        ):  # it was on its way already, and comes again behind the one that was refused
            self._connection.on_early_message(raw)
        else:
            self._connection.close(DisconnectReason.POLICY, code=4412, text="a message is missing")
        return False

    def _accept(self, seq: int) -> None:
        """A message counts as accepted from here on, whatever its handler does."""
        self.session.accepted = seq
        self._schedule_ack()

    def _handle_control(self, kind: str, frame: dict[str, Any], raw: str | bytes) -> None:
        session, connection = self.session, self._connection
        if kind not in ("ack", "reply", "pong"):
            connection.on_control_frame()
        if kind == "ack":
            self._acknowledge(seq := require_int(frame, "seq"))
            self._count_ack(seq)
        elif kind == "ping":
            self._clear_pending_ack()
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
            token = optional_text(frame, "token", most=8192)
            self.credential.renewal_requested(token)
        elif kind == "hello":
            raise ProtocolError("a second hello")

    def _acknowledge(self, seq: int) -> None:
        if not self.session.acknowledged(seq):
            raise ProtocolError("more is acknowledged than was sent")

    def _count_ack(self, seq: int) -> None:
        """Of acknowledgements that say something new a client sends no more than it gets; the others are counted."""
        if seq > self._acknowledged:
            self._acknowledged = seq
        else:
            self._connection.on_control_frame()

    # ── what goes out ──

    def ping(self, now: float) -> bool:
        """Send a heartbeat in its turn among the messages, so that its number proves the client's count."""
        if not self._send_ping():
            return False
        self._connection.liveness.on_ping_sent(now)
        return True

    def _send_ping(self) -> bool:
        session, outbox = self.session, self._connection.outbox
        if not self.is_current or not outbox.make_room(PING_BYTES):
            return False
        queued: bool = outbox.put(control_frame("ping", seq=session.head))
        return queued

    def request_ack(self) -> None:
        """Ask the client for its number: a pong carries it, and comes at once. All who ask in one turn ask together."""
        if self._ack_request is None:
            self._ack_request = asyncio.get_running_loop().call_soon(self._send_ack_request)

    def _send_ack_request(self) -> None:
        self._ack_request = None
        if self._send_ping():
            self._connection.liveness.on_unmeasured_ping()

    def on_failed(self, message: Message) -> None:
        """A handler has failed with a message. It is not handled again in this session, but its key is not used up."""
        if message.key is not None:
            self._idempotency.failed(self.session.client_id, message.key)

    def on_no_answer(self, message: Message, code: str, text: str) -> None:
        """A handler is over without an answer. A request is answered with an error, which survives a reconnect."""
        self.on_failed(message)
        if message.id is not None:
            self.session.reply(message.id, error={"code": code, "message": text})

    def on_raw_read(self, message: Message) -> None:
        """A message was given to code that reads by itself and can answer no requests."""
        if message.id is not None:
            error = {"code": "no_handler", "message": "the endpoint reads messages itself, and answers no requests"}
            self.session.reply(message.id, error=error)

    def on_discarded(self, item: object) -> None:
        """A message was accepted, and nobody will ever read it: if it comes again, it is a new one."""
        if isinstance(item, Message):
            self.on_failed(item)

    def on_dropped(self, message: Message) -> None:
        """A message was accepted and goes unread, because the endpoint does not read. A request is answered so."""
        self.on_failed(message)
        if message.id is not None:
            self.reject(message, "not_read", "the endpoint does not read messages")

    def on_rate_exceeded(self, message: Message | None, code: str, text: str, wait: float) -> None:
        """Refuse a message because of a rate.

        A client that can send it again in its turn is told when, and it is not accepted: so nothing is lost, and the
        order stays. A request is answered instead, and the message of any other client is accepted and lost.
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
        """Tell the client that a message is not handled: as the answer to a request, or beside the messages."""
        if message is not None and message.id is not None:
            self.session.reply(message.id, error={"code": code, "message": text})
            return
        seq = None if message is None else message.seq
        self._connection.answer(control_frame("error", code=code, message=text, seq=seq))

    def on_handled(self, message: Message, answer: Any) -> None:
        """A message was handled: answer it if it is a request, and remember the answer under its key.

        Raises:
            MessageEncodeError: The answer cannot be JSON.
        """
        if message.id is not None:
            self.session.reply(message.id, answer)
        if message.key is not None:
            self._idempotency.handled(self.session, message.key, answer if message.id is not None else None)

    def on_interrupted(self, message: Message) -> None:
        """The connection broke in a handler, which may have done its work. The client may be back, and is told so."""
        if message.id is not None:
            error = {"code": "interrupted", "message": "the connection broke while this was handled"}
            self.session.reply(message.id, error=error)
        if message.key is not None:
            self._idempotency.interrupted(self.session.client_id, message.key)

    def _schedule_ack(self) -> None:
        self._unacknowledged += 1
        if self._unacknowledged >= ACK_EVERY:
            self._send_ack()
        elif self._ack_timer is None:
            self._ack_timer = asyncio.get_running_loop().call_later(ACK_WITHIN, self._send_ack)

    def _send_ack(self) -> None:
        self._clear_pending_ack()
        if self._connection.close_info is None and self.is_current:
            self._connection.answer(control_frame("ack", seq=self.session.accepted))

    def _clear_pending_ack(self) -> None:
        self._unacknowledged = 0
        if self._ack_timer is not None:
            self._ack_timer.cancel()
            self._ack_timer = None

    def emit_outcome(self) -> None:
        """Report what the hello has led to."""
        self._connection.emit(
            "session_attached",
            logging.INFO,
            session_id=self.session.connection_id,
            outcome=self.resume_result.outcome.value,
            why=self.resume_result.why,
        )
