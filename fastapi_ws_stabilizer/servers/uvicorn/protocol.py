"""`StableWebSocketProtocol`: uvicorn's WebSocket protocol with a direct transport.

```
uvicorn app:app --ws fastapi_ws_stabilizer.servers.uvicorn:StableWebSocketProtocol
```

or `uvicorn.run(app, **manager.uvicorn_options())`. Other WebSocket routes work as with uvicorn's own protocol. So do
all routes if uvicorn lacks internals that `compat` requires; a warning says so once.

Differences for an attached connection:

- Reading continues while the application is busy, so pings, pongs and closes are seen. It stops on request.
- The protocol sends ping frames and reports their pongs.
- Bytes are written unchanged: the sender frames, joins and compresses them once for all recipients.
- Parsed messages go directly to the inbox, without a queue and a task in between.

`FrameParser` parses the frames of all connections. uvicorn and the `websockets` library still do the handshake and the
closing handshake.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Coroutine, Generator
from typing import Any, Final
from uuid import UUID

from websockets.exceptions import ProtocolError
from websockets.extensions.permessage_deflate import PerMessageDeflate
from websockets.frames import Frame, Opcode
from websockets.protocol import State

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.compat.uvicorn import PushedEvents
from fastapi_ws_stabilizer.servers.direct import EXTENSION, DirectReceiver
from fastapi_ws_stabilizer.servers.uvicorn.compat import (
    ALWAYS_WRITABLE,
    WebSocketsSansIOProtocol,
    lacks_handshake_internals,
    missing_internals,
)
from fastapi_ws_stabilizer.servers.uvicorn.deflate import DEFLATE
from fastapi_ws_stabilizer.servers.uvicorn.frame_parser import (
    INVALID_DATA,
    PROTOCOL_ERROR,
    FrameParser,
    ProtocolViolation,
)
from fastapi_ws_stabilizer.servers.uvicorn.paced_parser import CLOSE_GRACE, MAX_UNPACED_BYTES, PacedParser
from fastapi_ws_stabilizer.servers.uvicorn.upgrade import read_request, with_shared_parts
from fastapi_ws_stabilizer.wire.rfc6455 import BINARY, CLOSE, PING, PONG, frame_bytes

EXTENSIONS: Final = [DEFLATE]
"""Extensions of every connection that may compress."""

CLOSED_PARSER: Final[Generator[None, None, None]] = (None for _ in ())
"""Parser of every `websockets` connection whose frames `FrameParser` parses."""
CLOSED_PARSER.close()

NO_ID: Final = UUID(int=0)
"""Id of every `websockets` connection. uvicorn does not log it."""


class StableWebSocketProtocol(WebSocketsSansIOProtocol):
    """uvicorn's sans-I/O WebSocket protocol as a `DirectTransport`, one for each WebSocket.

    Attributes:
        sink: The receiver; `None` before a connection is attached, and after its end.
        parser: Parser of the frames; `None` before the handshake is accepted.
        paced: Control of the parser, created when it must not parse everything at once; `None` before.
        own_pings: Whether the receiver sends pings, so that uvicorn does not.
        running_calls: Number of calls of `receive` and `send` that have not returned.
        early_data: Bytes that arrived before the handshake was answered.
        is_supported: Whether uvicorn has all internals that are used here. Otherwise it works as without this class.
    """

    # Beside the attributes of uvicorn's class, these would double the size of each instance's dict.
    __slots__ = (
        "early_data",
        "is_supported",
        "own_pings",
        "paced",
        "parser",
        "running_calls",
        "sink",
        "window_bits",
        "write_paused",
    )

    queue: Any
    request: Any
    response: Any
    writable: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sink: DirectReceiver | None = None
        self.parser: FrameParser | None = None
        self.paced: PacedParser | None = None
        self.own_pings = False
        self.running_calls = 0
        self.write_paused = False
        self.window_bits = 0
        self.early_data = b""
        self.is_supported = not missing_internals(self)
        if self.is_supported and self.config.ws_per_message_deflate:
            self.conn.available_extensions = EXTENSIONS

    async def receive(self) -> Any:
        """Return the next ASGI event."""
        self.running_calls += 1
        try:
            return await super().receive()
        finally:
            self.running_calls -= 1

    async def send(self, message: Any) -> None:
        """Process an ASGI message. After the accept, parse the bytes that arrived too early."""
        self.running_calls += 1
        try:
            await super().send(message)
        finally:
            self.running_calls -= 1
        if self.parser is not None or not self.is_supported:
            return
        if message["type"] == "websocket.http.response.body" and not message.get("more_body"):
            self.handshake_complete = True  # otherwise uvicorn logs an application failure for each rejection
        if self.handshake_complete:
            self._start_parser()

    def run_asgi(self) -> Coroutine[Any, Any, None]:
        """Run the application, and announce the direct transport in its scope."""
        self.is_supported = self.is_supported and not lacks_handshake_internals(self)
        if self.is_supported:
            self.scope["extensions"][EXTENSION] = {}
            self.scope["headers"] = with_shared_parts(self.scope["headers"])
        return super().run_asgi()

    def _start_parser(self) -> None:
        """Parse frames from now on, if the handshake was accepted."""
        if self.conn.state is not State.OPEN:
            return
        inflated_bits = None
        for extension in self.conn.extensions:
            if isinstance(extension, PerMessageDeflate):
                self.window_bits = extension.local_max_window_bits
                inflated_bits = extension.remote_max_window_bits
        self.conn.parser.close()  # frees its generators: it parses no frames
        self.conn.parser, self.conn.id = CLOSED_PARSER, NO_ID
        limit = self.conn.max_message_size
        self.parser = FrameParser(sys.maxsize if limit is None else limit, inflated_bits)
        early_data, self.early_data = self.early_data, b""
        if early_data and not self.transport.is_closing():
            self.transport.resume_reading()
            self.data_received(early_data)

    # ── direct transport ──

    @property
    def in_use(self) -> bool:
        """See `DirectTransport`."""
        return self.running_calls > 0

    def refuse_compression(self) -> None:
        """See `DirectTransport`."""
        self.conn.extensions = []
        if "Sec-WebSocket-Extensions" in self.response.headers:
            del self.response.headers["Sec-WebSocket-Extensions"]

    def attach(self, sink: DirectReceiver, *, max_message_bytes: int, own_pings: bool) -> None:
        """See `DirectTransport`."""
        self.sink = sink
        came_before, self.queue = self.queue, PushedEvents(sink)
        self.writable = ALWAYS_WRITABLE
        self.request = self.response = None  # the handshake has ended, and nothing reads them again
        self.__dict__ = dict(self.__dict__)  # a table of half the size, because it doubles when it grows
        if self.parser is not None:
            self.parser.compact()  # an idle client may send nothing else, and its hello has been read
            self.parser.max_message_bytes = min(self.parser.max_message_bytes, max_message_bytes)
        self.own_pings = own_pings
        if own_pings:
            self.stop_keepalive()
            self.ping_interval = None  # `start_keepalive` does nothing then
        if self.read_paused:
            self.read_paused = False
            self.transport.resume_reading()
        while not came_before.empty():
            self.queue.put_nowait(came_before.get_nowait())

    def ping(self, payload: bytes) -> None:
        """See `DirectTransport`."""
        if not self.close_sent and not self.transport.is_closing():
            self.transport.write(frame_bytes(PING, payload))

    def close(self, code: int, reason: str) -> None:
        """See `DirectTransport`."""
        if self.close_sent or self.transport.is_closing():
            return
        self.conn.send_close(code, reason)
        self._write_output()
        self.close_sent = True
        self.resume_reading()  # to read the client's answer
        if self.paced is not None and self.paced.discarding:
            self.paced.close_after_grace()
            return
        self.close_timer = self.loop.call_later(self.close_timeout, self.transport.close)

    def pause_reading(self) -> None:
        """See `DirectTransport`."""
        parser, sink = self.parser, self.sink
        if parser is not None and sink is not None and not self.read_paused and not self.transport.is_closing():
            self.read_paused = True
            self.queue.hold()  # the messages that came before the attach, if any are left
            self._paced(parser, sink).stop_reading()

    def resume_reading(self) -> None:
        """See `DirectTransport`."""
        if self.read_paused:
            self.read_paused = False
            if self.paced is not None and not self.transport.is_closing():
                self.paced.resume_reading()

    # ── callbacks of asyncio ──

    def data_received(self, data: bytes) -> None:
        """Process received bytes. Hot path."""
        parser, sink = self.parser, self.sink
        if parser is None:
            self._on_handshake_data(data)
        elif sink is not None and (self.paced is not None or len(data) > MAX_UNPACED_BYTES or not sink.data_received()):
            self._paced(parser, sink).data_received(data)
        else:
            parser.feed(data)
            self._handle_frames(parser)

    def _on_handshake_data(self, data: bytes) -> None:
        """Process bytes that arrive before the handshake is accepted."""
        if self.is_supported and self.handshake_initiated and not self.handshake_complete:
            # A client must not send before the answer to its handshake (RFC 6455 section 4.1). No frame can be sent
            # yet, so these bytes are parsed after the answer.
            self.early_data += data
            self.transport.pause_reading()
            return
        if self.is_supported and not self.handshake_initiated and not self.conn.reader.buffer:
            request = read_request(data)
            if request is not None:
                self.handle_connect(request)
                return
        try:
            super().data_received(data)
        except UnicodeEncodeError:  # websockets before 17 accepts a path and headers that are not ASCII
            if not self.is_supported:
                raise
            is_bad = True
        else:
            is_bad = self.conn.handshake_exc is not None and not self.handshake_initiated
        if self.is_supported and is_bad:
            # The HTTP parser accepted an invalid handshake, which uvicorn would neither answer nor close.
            self.handshake_initiated = self.close_sent = True
            self.transport.write(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
            self.transport.close()

    def pause_writing(self) -> None:
        """Stop writing, because the transport's buffer is full."""
        self.write_paused = True
        if self.sink is None:
            super().pause_writing()
        else:
            self.sink.pause_writing()

    def resume_writing(self) -> None:
        """Write again, because the transport's buffer has space."""
        self.write_paused = False
        if self.sink is None:
            super().resume_writing()
        else:
            self.sink.resume_writing()

    def shutdown(self) -> None:
        """Flush before the server stops; it sends 1012 next."""
        if self.is_supported and self.transport.is_closing():
            # The connection has a close frame or is broken, and the client may not read. uvicorn would close it again,
            # which raises, and the other connections would get no close frame.
            self.stop_keepalive()
            self.loop.call_later(CLOSE_GRACE, self.transport.abort)
            return
        if self.sink is not None and not self.close_sent:
            self.sink.before_shutdown()
        super().shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        """Report the end of the connection."""
        if self.sink is not None and (received := self.conn.close_rcvd) is not None:
            # uvicorn reports a close only if it can answer it. This one came after data that a full inbox held up.
            self.queue.put_nowait({"type": "websocket.disconnect", "code": received.code, "reason": received.reason})
        super().connection_lost(exc)
        if self.is_supported and self.sink is None:  # one event for each waiting reader: an earlier one, and ours
            self.queue.put_nowait({"type": "websocket.disconnect", "code": 1005})
        if self.is_supported:
            self.conn.parser.close()  # a suspended generator and its object refer to each other
        if self.parser is not None:
            self.parser.end()
        if self.sink is not None:
            self.queue.stop()
            self.sink = self.paced = None  # each of them, and the queue, refers to this object

    # ── frames ──

    def _paced(self, parser: FrameParser, sink: DirectReceiver) -> PacedParser:
        """Return the control of the parser. From its creation on, all data goes through it."""
        if self.paced is None:
            self.paced = PacedParser(self, parser, sink, self.queue, self._handle_frames)
        return self.paced

    def _handle_frames(self, parser: FrameParser, until: float | None = None) -> bool:
        """Handle the frames that have arrived. Hot path.

        Args:
            parser: The parser, to which received bytes were fed.
            until: Time at which to stop; `None` to handle all frames.

        Returns:
            Whether it stopped because of the time or because reading was paused, so that frames may be left.
        """
        sink = self.sink
        try:
            while (frame := parser.next_frame()) is not None:
                opcode, content = frame
                if opcode > BINARY:
                    if opcode == CLOSE:
                        parser.end()  # nothing is read after it
                    self._handle_control_frame(opcode, content)
                elif not self.close_sent:
                    if sink is not None:
                        sink.message_received(content)
                    else:
                        self._queue_message(content)
                if sink is not None and (self.read_paused or (until is not None and monotonic() >= until)):
                    return True
        except ProtocolViolation as violation:
            parser.end()
            # Without the exception, whose traceback refers to this frame.
            fail = functools.partial(self._fail, violation.code, violation.reason)
            if sink is not None:
                sink.violation_received(fail)
            elif self.queue.empty():
                fail()
            else:  # an application that waits for a message reads one, and can answer it
                self.loop.call_soon(fail)
        return False

    def _queue_message(self, message: str | bytes) -> None:
        """Give a message to an application that reads without a direct transport, as uvicorn does."""
        self.queue.put_nowait({"type": "websocket.receive", ("text" if isinstance(message, str) else "bytes"): message})
        if not self.read_paused:
            self.read_paused = True
            self.transport.pause_reading()

    def _handle_control_frame(self, opcode: int, payload: Any) -> None:
        sink = self.sink
        if opcode == PING:
            if sink is not None:
                sink.ping_received()
            # A client that floods pings and reads no pongs gets none. RFC 6455 section 5.5.3 allows the omission.
            if not (self.write_paused or self.close_sent or self.transport.is_closing()):
                self.transport.write(frame_bytes(PONG, payload))
        elif opcode == PONG:
            if sink is not None:
                sink.pong_received(payload)
            if not self.own_pings:
                self.handle_pong(Frame(Opcode.PONG, payload))
        elif opcode == CLOSE:
            self._handle_close_frame(Frame(Opcode.CLOSE, payload))

    def _handle_close_frame(self, frame: Frame) -> None:
        """Answer a close frame, or take it as an answer.

        Raises:
            ProtocolViolation: Its code or its reason is invalid.
        """
        if self.conn.eof_sent:  # the server has failed the connection already, for example after a missing pong
            return
        try:
            self.conn.recv_frame(frame)
        except ProtocolError as error:
            raise ProtocolViolation(PROTOCOL_ERROR, str(error)) from None
        except UnicodeDecodeError:
            raise ProtocolViolation(INVALID_DATA, "close reason is not UTF-8") from None
        self.handle_close(frame)

    def _fail(self, code: int, reason: str) -> None:
        """Fail the connection (RFC 6455 section 7.1.7).

        uvicorn closes the transport immediately. If unread bytes of the client are left, that is a TCP reset, which can
        overtake the close frame. So this method closes the sending half only, and discards received data for a moment.
        """
        if self.close_sent or self.transport.is_closing():
            self.transport.close()
            return
        if self.sink is not None:
            self.sink.before_shutdown()
        self.conn.fail(code, reason)
        self.queue.put_nowait({"type": "websocket.disconnect", "code": code, "reason": reason})
        self._write_output()
        self.close_sent = True
        if self.sink is None or self.parser is None:
            self.transport.close()
        else:
            self._paced(self.parser, self.sink).discard()

    def _write_output(self) -> None:
        output = b"".join(self.conn.data_to_send())
        if output:
            self.transport.write(output)
