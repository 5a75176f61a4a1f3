"""Server side of `stabilizer.v1.json` for one connection: numbers, acknowledgements, pings.

It is between the read pump and the inbox. It passes on application messages once and in order, and handles all other
frames.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from dataclasses import replace
from typing import Any, Final

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.close_codes import SESSION_ENDED, CloseInfo, DisconnectReason
from fastapi_ws_stabilizer.config import CompressionMode, HeartbeatType, WebSocketConfig
from fastapi_ws_stabilizer.connection.connection import AnyConnection, Connection
from fastapi_ws_stabilizer.connection.credential_expiry import CredentialExpiry
from fastapi_ws_stabilizer.connection.inbox import Item
from fastapi_ws_stabilizer.connection.protocol import ClientProtocol, check_not_volatile, is_too_big
from fastapi_ws_stabilizer.errors import RequestTimeoutError
from fastapi_ws_stabilizer.sessions.idempotency import IdempotencyCache
from fastapi_ws_stabilizer.sessions.session import Session
from fastapi_ws_stabilizer.sessions.store import ResumeResult
from fastapi_ws_stabilizer.tasks import wait_for_all
from fastapi_ws_stabilizer.wire.encoded import EncodedMessage
from fastapi_ws_stabilizer.wire.envelope import sequenced_frame
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
    to_milliseconds,
)

ACK_WITHIN: Final = 0.05
"""Maximum seconds until a message is acknowledged. The protocol allows 1 s, but a client that waits for each
acknowledgement before its next message would be slowed down by that much."""


ACK_START: Final = '{"type":"ack","seq":'
ACK_CHARS: Final = len(ACK_START)
MAX_DIGITS: Final = 16

PING_BYTES: Final = 64
"""Upper bound for the bytes of a ping frame."""


class V1Protocol(ClientProtocol):
    """Server side of `stabilizer.v1.json` for one connection.

    Args:
        resume_result: Result of the client's hello.
        config: Options of the manager.
        idempotency: Cache of handled idempotency keys.

    Attributes:
        session: Session of the connection. Another connection can take it over, see `is_current`.
        max_inflated: Maximum bytes of a decompressed frame; 0 if compressed frames were not negotiated.
    """

    __slots__ = (
        "_ack_request",
        "_acknowledged",
        "_acks",
        "_connection",
        "_idempotency",
        "_rejected_seq",
        "_resume_result",
        "_sequenced_count",
        "max_inflated",
        "session",
    )

    acknowledges = True

    _connection: Connection
    """The connection, from its opening to its end."""

    _resume_result: ResumeResult
    """The result of the client's hello, until the connection is open."""

    def __init__(self, resume_result: ResumeResult, config: WebSocketConfig, idempotency: IdempotencyCache) -> None:
        self.session: Session = resume_result.session
        self._resume_result = resume_result
        self._idempotency = idempotency
        compresses = resume_result.deflates and config.compression is CompressionMode.DEFLATE
        self.max_inflated = config.max_message_size if compresses else 0
        # Number of the message that the client must send again; 0 for none, -1 if the client cannot do that.
        self._rejected_seq = 0 if resume_result.retries else -1
        self._acknowledged = -1  # the highest number that the client acknowledged on this connection
        self._acks: DelayedAcks | None = None  # created for the first received message
        self._ack_request: asyncio.Handle | None = None
        self._sequenced_count = 0  # numbered messages in both directions at the reaper's last check

    # ── the connection ──

    def on_open(self, connection: Connection) -> None:
        """Take over the session: the connection sends its messages and fills its inbox from now on.

        Nothing here awaits. Therefore no message arrives in between, and none is sent or read twice.
        """
        self._connection = connection
        session = self.session
        previous = session.previous_connection
        if session.inbox is not None:
            rest = session.inbox.transfer()
            connection.inbox = session.inbox
            if previous is not None:  # otherwise its teardown has ended
                previous.inbox = rest
                connection.add_predecessor(previous)
        session.inbox, session.previous_connection = connection.inbox, connection
        if self.max_inflated:
            connection.outbox.deflate_frames()
        resume_result = self._resume_result
        del self._resume_result
        replaced = session.attach(connection, resume_result.cursor, self._welcome(resume_result, connection.config))
        connection.emit(
            "session_attached",
            logging.INFO,
            session_id=session.connection_id,
            outcome=resume_result.outcome.value,
            why=resume_result.why,
        )
        if replaced is not None:
            replaced.close(DisconnectReason.REPLACED, reason="session taken over by another connection")

    def _welcome(self, resume_result: ResumeResult, config: WebSocketConfig) -> EncodedMessage:
        """Return the frame that answers the hello, with a new token."""
        session = self.session
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

    def map_close(self, close_info: CloseInfo) -> CloseInfo:
        """Return the close info of a connection that starts to close.

        Proxies send 1000 too, so clients reconnect after it.
        """
        if close_info.code == 1000 and not close_info.by_peer:
            return replace(close_info, code=SESSION_ENDED)
        return close_info

    def on_closing(self) -> None:
        """Cancel timers when the connection starts to close."""
        self._reset_acks()
        if self._ack_request is not None:
            self._ack_request.cancel()

    def release(self) -> None:
        """Drop the connection after its end."""
        del self._connection

    def consume_activity(self, connection: Connection) -> bool:
        """Return whether a message was received or sent since the last call. The outbox contains pings too."""
        count = self.session.head + self.session.accepted
        active, self._sequenced_count = connection.used or count != self._sequenced_count, count
        connection.used = connection.outbox.used = False
        return active

    # ── receiving ──

    def decode(self, connection: Connection, raw: str | bytes) -> Message | None:
        """Handle a frame. Return its message if it is for user code."""
        session = self.session
        if session.connection is not connection or is_too_big(connection, raw):
            return None
        if (
            raw[:ACK_CHARS] == ACK_START and raw[-1] == "}"
        ):  # the most frequent frame, as written by this project's clients
            digits = raw[ACK_CHARS:-1]
            plain = digits.isascii() and digits.isdigit() and digits[0] != "0" and len(digits) < MAX_DIGITS
            if plain and session.acknowledge(seq := int(digits)):
                session.confirm()
                self._count_ack(connection, seq)
                return None
        try:
            if self.max_inflated:
                raw = inflated(raw, self.max_inflated)
            frame = parse(raw)
            session.confirm()
            kind = frame["type"]
            if kind == "msg":
                return self._message(connection, message_of(frame), raw)
            if kind not in LONG_TYPES and is_longer(raw, MAX_CONTROL_BYTES):
                raise ProtocolError(f"a control frame may have at most {MAX_CONTROL_BYTES} bytes")
            self._handle_control(connection, kind, frame, raw)
        except ProtocolError as problem:
            too_big = problem.code == 1009
            cause = DisconnectReason.MESSAGE_TOO_BIG if too_big else DisconnectReason.POLICY
            connection.close(cause, code=problem.code, reason=str(problem))
        return None

    def _message(self, connection: Connection, message: Message, raw: str | bytes) -> Message | None:
        session = self.session
        if message.seq is not None and not self._is_next(connection, message.seq, raw):
            return None
        watches = connection.resources.watches_input
        if watches and not connection.admit_message(raw, message):
            return None
        if message.seq is not None:
            self._accept(message.seq)
        if message.key is not None:
            known = self._idempotency.look(session.client_id, message.key)
            if known is not None:
                known.answer(session, message)
                return None
            self._idempotency.begin(session.client_id, message.key)
        connection.events.counters.messages_received += 1
        connection.used = True
        inbox = connection.inbox
        if message.id is not None and inbox.ignored:
            connection.events.counters.messages_discarded += 1
            self.on_not_read(connection, message)
            return None
        message.size = sys.getsizeof(raw)
        if (
            isinstance(raw, str)
            and (message.data.__class__ is dict or message.data.__class__ is list)
            and not inbox.has_waiting_reader  # otherwise it is read in this loop iteration
        ):
            message.size += estimate_parsed_size(raw)
        if watches:
            connection.on_message()
        return message

    def _is_next(self, connection: Connection, seq: int, raw: str | bytes) -> bool:
        """Return whether a number is the next one. If not, acknowledge, ignore or close."""
        next_one = self.session.accepted + 1
        if seq == next_one:
            return True
        if seq < next_one:  # sent again, because the acknowledgement did not reach the client
            self._schedule_ack()
            connection.on_control_frame()
        elif self._rejected_seq == next_one:  # sent before the rejection arrived; the client sends it again later
            connection.quota.on_early_message(connection, raw)
        else:
            connection.close(DisconnectReason.POLICY, code=4412, reason="a message is missing")
        return False

    def _accept(self, seq: int) -> None:
        """Mark a message as accepted, regardless of what its handler does."""
        self.session.accepted = seq
        self._schedule_ack()

    def _handle_control(self, connection: Connection, kind: str, frame: dict[str, Any], raw: str | bytes) -> None:
        session = self.session
        if kind not in ("ack", "reply", "pong"):
            connection.on_control_frame()
        if kind == "ack":
            self._acknowledge(seq := require_int(frame, "seq"))
            self._count_ack(connection, seq)
        elif kind == "ping":
            self._reset_acks()
            connection.answer(control_frame("pong", ts=ping_timestamp(frame), ack=session.accepted))
        elif kind == "pong":
            if unsolicited := connection.liveness.on_pong(monotonic()):
                connection.on_control_frame(unsolicited)
            if (acknowledged := optional_int(frame, "ack")) is not None:
                self._acknowledge(acknowledged)
        elif kind == "reply":
            if self._is_next(connection, seq := require_int(frame, "seq", least=1), raw):
                self._accept(seq)
                if not session.requests.resolve(
                    optional_identifier(frame, "re") or "", frame.get("data"), frame.get("error")
                ):
                    connection.on_control_frame()
        elif kind == "auth":
            token = optional_text(frame, "token", max_chars=8192)
            if connection.credential is None:
                connection.credential = CredentialExpiry()
            connection.credential.request_renewal(connection, token)
        elif kind == "hello":
            raise ProtocolError("unexpected second hello")

    def _acknowledge(self, seq: int) -> None:
        if not self.session.acknowledge(seq):
            raise ProtocolError("acknowledged more messages than were sent")

    def _count_ack(self, connection: Connection, seq: int) -> None:
        """Count an acknowledgement without a new number as a control frame.

        The number of sent messages limits all others.
        """
        if seq > self._acknowledged:
            self._acknowledged = seq
        else:
            connection.on_control_frame()

    def on_raw_read(self, message: Message) -> None:
        """Answer a request with an error if user code reads messages directly and cannot reply."""
        if message.id is not None:
            error = {"code": "no_handler", "message": "the endpoint reads messages itself and does not answer requests"}
            self.session.reply(message.id, error=error)

    def on_not_read(self, connection: Connection, item: Item) -> None:
        """Handle an accepted message that the endpoint does not read. A request gets an error reply."""
        self.on_failed(item)
        if isinstance(item, Message) and item.id is not None:
            self.reject(connection, item, "not_read", "the endpoint does not read messages")

    def on_excess(self, connection: Connection, message: Message | None, code: str, text: str, wait: float) -> None:
        """Reject a message that exceeds a rate.

        If the client can send it again in order, the error frame says when. The message is not accepted, so nothing is
        lost and the order stays. If a message is a request, or the client cannot send it again, it is accepted. Then a
        request gets an error reply, and any other message is lost.
        """
        seq = None if message is None else message.seq
        if message is None or seq is None or seq <= self.session.accepted:
            self.reject(connection, message, code, text)
        elif self._rejected_seq < 0 or message.id is not None:
            self._accept(seq)
            self.reject(connection, message, code, text)
        else:
            self._rejected_seq = seq
            connection.answer(control_frame("error", code=code, message=text, seq=seq, retry=to_milliseconds(wait)))

    @property
    def keeps_unread(self) -> bool:
        """Whether the session goes on, so that unread messages stay for its next connection."""
        return self.session.ended is None

    # ── results of handlers ──

    def on_handled(self, item: Item, answer: Any) -> None:
        """Reply to a handled request, and store the reply under the message's idempotency key.

        Raises:
            MessageEncodeError: The reply cannot be encoded as JSON.
        """
        if not isinstance(item, Message):
            return
        if item.id is not None:
            self.session.reply(item.id, answer)
        if item.key is not None:
            self._idempotency.complete(self.session, item.key, answer if item.id is not None else None)

    def on_interrupted(self, item: Item) -> None:
        """Handle a message after a lost connection has interrupted its handler, which may have done its work.

        A request gets an error reply, which the client receives if it resumes.
        """
        if not isinstance(item, Message):
            return
        if item.id is not None:
            error = {"code": "interrupted", "message": "the connection was lost while this was handled"}
            self.session.reply(item.id, error=error)
        if item.key is not None:
            self._idempotency.interrupt(self.session.client_id, item.key)

    def on_failed(self, item: Item) -> None:
        """Release the idempotency key of a message that was not handled.

        The message is not handled again in this session, but a later one with the same key is.
        """
        if isinstance(item, Message) and item.key is not None:
            self._idempotency.fail(self.session.client_id, item.key)

    def on_no_answer(self, item: Item, code: str, text: str) -> None:
        """Handle a handler that ended without a reply. A request gets an error reply, which survives a reconnect."""
        self.on_failed(item)
        if isinstance(item, Message) and item.id is not None:
            self.session.reply(item.id, error={"code": code, "message": text})

    def reject(self, connection: Connection, message: Message | None, code: str, text: str) -> None:
        """Inform the client that a message is not handled, with an error reply to a request or an error frame."""
        if message is not None and message.id is not None:
            self.session.reply(message.id, error={"code": code, "message": text})
            return
        seq = None if message is None else message.seq
        connection.answer(control_frame("error", code=code, message=text, seq=seq))

    # ── sending ──

    def try_send(self, connection: Connection, frame: EncodedMessage) -> bool:
        """Number, store and send a message on the fast path. Hot path."""
        return connection.close_info is None and self.session.outbox.try_send(connection.outbox, frame)

    async def put_wait(self, connection: Connection, frame: EncodedMessage) -> bool:
        """Number, store and queue a message as soon as there is room."""
        if connection.close_info is not None:
            return False
        return await self.session.outbox.put_wait(connection.outbox, frame) is not None

    async def send_with_ack(self, connection: Connection, frame: EncodedMessage) -> None:
        """Queue a message and wait until the client acknowledges it, in this connection or a later one."""
        connection.check_loop()
        check_not_volatile(frame)
        seq = await self._enqueue_sequenced(connection, frame)
        if connection.close_info is None:  # it may have started to close since the message was queued
            self.request_ack()
        await self.session.requests.until_acknowledged(seq)

    async def request(self, connection: Connection, event: str, data: Any, timeout: float) -> Any:
        """Send a request to the client and wait for its reply, in this connection or a later one."""
        await connection.still_open()
        requests = self.session.requests
        request_id, answer = requests.open()
        try:
            await self._enqueue_sequenced(connection, sequenced_frame("msg", data, event=event, id=request_id))
            if not await wait_for_all([answer], timeout):
                raise RequestTimeoutError(timeout)
            return answer.result()
        finally:
            requests.forget(request_id)

    async def _enqueue_sequenced(self, connection: Connection, frame: EncodedMessage) -> int:
        """Queue a frame and return its sequence number."""
        seq = None
        if connection.close_info is None:
            seq = await self.session.outbox.put_wait(connection.outbox, frame)
        if seq is None:
            raise await connection.closed_error()
        return seq

    def pings_are_answered(self, _: Connection) -> bool:
        """Return `True`: every client answers ping frames."""
        return True

    def ping(self, connection: Connection, _: EncodedMessage | None, now: float) -> bool:
        """Queue a ping after the waiting messages, so that its number verifies the client's count."""
        if not self._send_ping(connection):
            return False
        connection.liveness.on_ping_queued(now)
        return True

    def _send_ping(self, connection: Connection) -> bool:
        session, outbox = self.session, connection.outbox
        if session.connection is not connection or not outbox.make_room(PING_BYTES):
            return False
        return outbox.put(control_frame("ping", seq=session.head))

    def request_ack(self) -> None:
        """Request an acknowledgement with a ping, because its pong carries one at once.

        All requests of one loop iteration share one ping.
        """
        if self._ack_request is None:
            context = self._connection.resources.outbox_limits.context  # not that of the code that sends
            self._ack_request = asyncio.get_running_loop().call_soon(self._send_ack_request, context=context)

    def _send_ack_request(self) -> None:
        self._ack_request = None
        if self._send_ping(self._connection):
            self._connection.liveness.on_unmeasured_ping()

    def _schedule_ack(self) -> None:
        if self._acks is None:
            self._acks = DelayedAcks(ACK_WITHIN)
        self._acks.schedule(self._send_ack)

    def _reset_acks(self) -> None:
        if self._acks is not None:
            self._acks.reset()

    def _send_ack(self) -> None:
        self._reset_acks()
        connection = self._connection
        if connection.close_info is None and self.is_current:
            connection.answer(control_frame("ack", seq=self.session.accepted))

    def request_drain(self, connection: Connection, after: float, within: float, why: DisconnectReason) -> bool:
        """Ask the client to disconnect and reconnect."""
        milliseconds = {"after": round(after * 1000), "within": round(within * 1000)}
        word = "restart" if why is DisconnectReason.SERVER_SHUTDOWN else why.value
        connection.answer(control_frame("drain", **milliseconds, why=word))
        return True


def session_of(connection: AnyConnection) -> Session | None:
    """Return the session of a connection; `None` for a plain client."""
    protocol = connection.protocol
    return protocol.session if isinstance(protocol, V1Protocol) else None
