"""What a connection does differently for a plain client and for a client of `stabilizer.v1.json`."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any, ClassVar, Final

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.close_codes import CloseInfo, DisconnectReason
from fastapi_ws_stabilizer.config import HeartbeatType
from fastapi_ws_stabilizer.connection.credential_expiry import parse_renewal
from fastapi_ws_stabilizer.connection.direct_outbox import DirectOutbox
from fastapi_ws_stabilizer.connection.inbox import Item
from fastapi_ws_stabilizer.errors import UnsupportedByClientError
from fastapi_ws_stabilizer.queueing import Recipient
from fastapi_ws_stabilizer.wire.encoded import EncodedMessage, encode
from fastapi_ws_stabilizer.wire.text_ping import MAX_CONTROL_CHARS, TextPing, parse_text_ping
from fastapi_ws_stabilizer.wire.v1.frames import Message

if TYPE_CHECKING:
    from fastapi_ws_stabilizer.connection.connection import Connection


class ClientProtocol(abc.ABC):
    """Protocol of one kind of client.

    Methods get the connection, so that all plain connections share one object.

    Attributes:
        acknowledges: Whether both sides acknowledge messages. Received ones are never dropped then, and sent ones stay
            in a replay buffer.
    """

    __slots__ = ()

    acknowledges: ClassVar[bool]

    # ── the connection ──

    @property
    @abc.abstractmethod
    def session(self) -> Recipient | None:
        """Session of the client; `None` for a plain client."""

    @abc.abstractmethod
    def on_open(self, connection: Connection) -> None:
        """Attach an opened connection to its session."""

    @abc.abstractmethod
    def map_close(self, close_info: CloseInfo) -> CloseInfo:
        """Return the close info of a connection that starts to close."""

    @abc.abstractmethod
    def on_closing(self) -> None:
        """Stop timers when the connection starts to close."""

    @abc.abstractmethod
    def release(self) -> None:
        """Drop the connection after its end."""

    @abc.abstractmethod
    def consume_activity(self, connection: Connection) -> bool:
        """Return whether a message was received or sent since the last call."""

    # ── receiving ──

    @abc.abstractmethod
    def decode(self, connection: Connection, raw: str | bytes) -> Item | None:
        """Return the message for user code; `None` if it was handled here. Hot path: this runs for every message."""

    @abc.abstractmethod
    def on_raw_read(self, message: Message) -> None:
        """Handle a parsed message that user code reads in its raw form."""

    @abc.abstractmethod
    def on_not_read(self, connection: Connection, item: Item) -> None:
        """Handle a received message that is dropped because the endpoint does not read."""

    @abc.abstractmethod
    def on_excess(self, connection: Connection, message: Message | None, code: str, text: str, wait: float) -> None:
        """Inform the client that a message exceeds a rate, and that it may send again after `wait` seconds."""

    @property
    @abc.abstractmethod
    def keeps_unread(self) -> bool:
        """Whether unread messages stay for the next connection of the session."""

    # ── results of handlers ──

    @abc.abstractmethod
    def on_handled(self, item: Item, answer: Any) -> None:
        """Answer a handled message.

        Raises:
            MessageEncodeError: The answer cannot be encoded as JSON.
        """

    @abc.abstractmethod
    def on_interrupted(self, item: Item) -> None:
        """Handle a message after the end of the connection has interrupted its handler."""

    @abc.abstractmethod
    def on_failed(self, item: Item) -> None:
        """Handle a message that was not handled. A later one with the same idempotency key is handled."""

    @abc.abstractmethod
    def on_no_answer(self, item: Item, code: str, text: str) -> None:
        """Handle a message whose handler ended without an answer."""

    @abc.abstractmethod
    def reject(self, connection: Connection, message: Message | None, code: str, text: str) -> None:
        """Inform the client that a message is not handled."""

    # ── sending ──

    @abc.abstractmethod
    def try_send(self, connection: Connection, frame: EncodedMessage) -> bool:
        """Send a message of user code on the fast path. `False`, with nothing queued, if the slow path must decide.

        Hot path.
        """

    @abc.abstractmethod
    async def put_wait(self, connection: Connection, frame: EncodedMessage) -> bool:
        """Queue a message as soon as there is room. Return `False` if the connection closed before.

        Cancelling discards the message, unless it has just been queued or has replaced that of another sender.
        """

    @abc.abstractmethod
    async def send_with_ack(self, connection: Connection, frame: EncodedMessage) -> None:
        """Queue a message and wait until the client acknowledges it. Cancelling ends the wait.

        Raises:
            SocketClosed: The connection is closed, and the message was not queued.
            SessionEndedError: The session has ended.
            RequestError: The client resumed too late and will not get the message.
            UnsupportedByClientError: The client does not support acknowledgements.
        """

    @abc.abstractmethod
    async def request(self, connection: Connection, event: str, data: Any, timeout: float) -> Any:
        """Send a request to the client and wait for its reply. Cancelling ends the wait.

        Raises:
            RequestTimeoutError: No reply arrived in time.
            RequestError: The client replied with an error.
            SocketClosed: The connection is closed, and the request was not queued.
            SessionEndedError: The session has ended.
            UnsupportedByClientError: The client does not support requests.
            MessageEncodeError: The data cannot be encoded as JSON that the client reads, or the event name is invalid.
        """

    @abc.abstractmethod
    def pings_are_answered(self, connection: Connection) -> bool:
        """Return whether heartbeats are pings that every client answers automatically."""

    @abc.abstractmethod
    def ping(self, connection: Connection, frame: EncodedMessage | None, now: float) -> bool:
        """Send a heartbeat. Return `False` if it cannot be sent now.

        Args:
            connection: The connection.
            frame: The heartbeat as a message; `None` for a ping that the client answers automatically.
            now: Time on the monotonic clock.
        """

    @abc.abstractmethod
    def request_drain(self, connection: Connection, after: float, within: float, why: DisconnectReason) -> bool:
        """Ask the client to disconnect and reconnect. Return `False` if it cannot be asked.

        Args:
            connection: The connection.
            after: Seconds until the client should disconnect.
            within: Seconds until the server closes the connection if the client has not left.
            why: Cause of the close when the client leaves.
        """


class PlainProtocol(ClientProtocol):
    """Protocol of a client that sends and gets messages as they are. It has no state."""

    __slots__ = ()

    acknowledges = False

    @property
    def session(self) -> None:
        """Return `None`: there is no session."""
        return None

    def on_open(self, _: Connection) -> None:
        """Do nothing: there is no session."""

    def map_close(self, close_info: CloseInfo) -> CloseInfo:
        """Return the close info unchanged."""
        return close_info

    def on_closing(self) -> None:
        """Do nothing: there are no timers."""

    def release(self) -> None:
        """Do nothing: all connections share this object."""

    def consume_activity(self, connection: Connection) -> bool:
        """Return whether a message was received or queued since the last call."""
        active = connection.used or connection.outbox.used
        connection.used = connection.outbox.used = False
        return active

    # ── receiving ──

    def decode(self, connection: Connection, raw: str | bytes) -> Item | None:
        """Return the message for user code; `None` if it was handled here. Hot path: this runs for every message.

        It checks a text's length and first character before it parses anything.
        """
        if (
            isinstance(raw, str)
            and len(raw) <= MAX_CONTROL_CHARS
            and connection.control_frames
            and (control := parse_text_ping(raw)) is not None
        ):
            if isinstance(control, TextPing):
                connection.on_control_frame()
                connection.answer(control.answer)
            elif unsolicited := connection.liveness.on_pong(monotonic()):
                connection.on_control_frame(unsolicited)
            return None
        resources = connection.resources
        # Nearly all messages are far below the limit, and a call for each would cost more than this check.
        if 4 * len(raw) > resources.config.max_message_size and is_too_big(connection, raw):
            return None
        credential = connection.credential
        if credential is not None and (token := parse_renewal(raw)) is not None:
            connection.on_control_frame()
            credential.request_renewal(connection, token)
            return None
        watches = resources.watches_input
        if watches and not connection.admit_message(raw):
            return None
        resources.events.counters.messages_received += 1
        connection.used = True
        if watches:
            connection.on_message()
        return raw

    def on_raw_read(self, _: Message) -> None:
        """Do nothing: a plain client has no parsed messages."""

    def on_not_read(self, _: Connection, __: Item) -> None:
        """Do nothing: a plain client gets no answer."""

    def on_excess(self, connection: Connection, _: Message | None, code: str, text: str, __: float) -> None:
        """Send the client an error message, ahead of queued ones."""
        connection.answer(_error(code, text))

    @property
    def keeps_unread(self) -> bool:
        """Return `False`: there is no session."""
        return False

    # ── results of handlers ──

    def on_handled(self, _: Item, __: Any) -> None:
        """Do nothing: a plain client gets no answer."""

    def on_interrupted(self, _: Item) -> None:
        """Do nothing: a plain client gets no answer."""

    def on_failed(self, _: Item) -> None:
        """Do nothing: a plain client has no idempotency keys."""

    def on_no_answer(self, _: Item, __: str, ___: str) -> None:
        """Do nothing: a plain client gets no answer."""

    def reject(self, connection: Connection, _: Message | None, code: str, text: str) -> None:
        """Send the client an error message."""
        connection.enqueue(_error(code, text))
        connection.outbox.flush()

    # ── sending ──

    def try_send(self, connection: Connection, frame: EncodedMessage) -> bool:
        """Send a message on the fast path. Hot path."""
        return connection.outbox.try_send(frame)

    async def put_wait(self, connection: Connection, frame: EncodedMessage) -> bool:
        """Queue a message as soon as there is room."""
        return await connection.outbox.put_wait(frame) is not None

    async def send_with_ack(self, connection: Connection, frame: EncodedMessage) -> None:
        """Raise, because the client sends no acknowledgements."""
        connection.check_loop()
        check_not_volatile(frame)
        await connection.still_open()
        raise UnsupportedByClientError

    async def request(self, connection: Connection, _: str, __: Any, ___: float) -> Any:
        """Raise, because the client sends no replies."""
        await connection.still_open()
        raise UnsupportedByClientError

    def pings_are_answered(self, connection: Connection) -> bool:
        """Return whether heartbeats are WebSocket ping frames."""
        return connection.is_direct and connection.resources.config.heartbeat_type is HeartbeatType.PING

    def ping(self, connection: Connection, frame: EncodedMessage | None, now: float) -> bool:
        """Send a heartbeat ahead of waiting messages."""
        outbox, liveness = connection.outbox, connection.liveness
        if frame is not None:
            if not outbox.put_control(frame):
                return False
            liveness.on_ping_queued(now)
            return True
        if not isinstance(outbox, DirectOutbox) or outbox.direct.write_paused:
            return False
        outbox.direct.ping(liveness.start_ping(now))
        return True

    def request_drain(self, _: Connection, __: float, ___: float, ____: DisconnectReason) -> bool:
        """Return `False`: a plain client cannot be asked."""
        return False


PLAIN: Final = PlainProtocol()
"""The protocol of all plain connections."""


def _error(code: str, text: str) -> EncodedMessage:
    return encode({"type": "error", "code": code, "message": text})


def is_too_big(connection: Connection, message: str | bytes) -> bool:
    """Return whether a message exceeds `max_message_size`. If so, close the connection."""
    max_size = connection.resources.config.max_message_size
    if len(message) > max_size or (
        4 * len(message) > max_size
        and isinstance(message, str)
        and not message.isascii()
        and len(message.encode("utf-8", "surrogatepass")) > max_size
    ):
        connection.close(DisconnectReason.MESSAGE_TOO_BIG, reason=f"message over {max_size} bytes")
        return True
    return False


def check_not_volatile(frame: EncodedMessage) -> None:
    """Raise if the message is volatile, because volatile messages are not acknowledged.

    Raises:
        ValueError: The message is volatile.
    """
    if frame.volatile:
        raise ValueError("volatile messages are not acknowledged: pass volatile=True or ack=True, but not both")
