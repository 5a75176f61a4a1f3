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

uvicorn and the `websockets` library still do the parsing, the handshake and the closing handshake.
"""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, Final

from websockets.exceptions import InvalidState
from websockets.extensions.permessage_deflate import PerMessageDeflate
from websockets.protocol import State

from fastapi_ws_stabilizer.servers.direct import EXTENSION, DirectReceiver
from fastapi_ws_stabilizer.servers.uvicorn.compat import (
    ALWAYS_WRITABLE,
    ReceiverQueue,
    has_waiting_call,
    lacks_handshake_internals,
    missing_internals,
)
from fastapi_ws_stabilizer.servers.uvicorn.deflate import DEFLATE
from fastapi_ws_stabilizer.servers.uvicorn.paced_parser import CLOSE_GRACE, PacedParser
from fastapi_ws_stabilizer.wire.rfc6455 import CLOSE, PING, frame_bytes

MAX_FRAGMENTS: Final = 1024
"""Maximum number of separately stored fragments of one message. No size limit covers them, because fragments may be
empty."""

MAX_CONTROL_BYTES: Final = 125  # RFC 6455 section 5.5

PONG_START: Final = b"\x8a"  # the first byte of a whole pong frame
CLOSE_START: Final = b"\x88"  # and of a close frame


class StableWebSocketProtocol(PacedParser):
    """uvicorn's sans-I/O WebSocket protocol as a `DirectTransport`, one for each WebSocket."""

    queue: Any
    request: Any
    response: Any
    writable: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.write_paused = False
        self.window_bits = 0
        self.max_message_bytes = 0
        self.fragments = 0
        self.fragment_bytes = 0
        self.early_data = b""
        self.is_supported = not missing_internals(self)
        if self.is_supported and self.config.ws_per_message_deflate:
            self.conn.available_extensions = [DEFLATE]

    async def send(self, message: Any) -> None:
        """Process an ASGI message. After the accept, parse the bytes that arrived too early."""
        await super().send(message)
        if self.is_supported and message["type"] == "websocket.http.response.body" and not message.get("more_body"):
            self.handshake_complete = True  # otherwise uvicorn logs an application failure for each rejection
        if self.early_data and self.handshake_complete:
            early_data, self.early_data = self.early_data, b""
            if not self.transport.is_closing():
                self.transport.resume_reading()
                self.data_received(early_data)

    def run_asgi(self) -> Coroutine[Any, Any, None]:
        """Run the application, and announce the direct transport in its scope."""
        self.is_supported = self.is_supported and not lacks_handshake_internals(self)
        if self.is_supported:
            self.scope["extensions"][EXTENSION] = {}
        return super().run_asgi()

    # ── direct transport ──

    @property
    def in_use(self) -> bool:
        """See `DirectTransport`."""
        return has_waiting_call(self.queue, self.writable)

    def refuse_compression(self) -> None:
        """See `DirectTransport`."""
        self.conn.extensions = []
        if "Sec-WebSocket-Extensions" in self.response.headers:
            del self.response.headers["Sec-WebSocket-Extensions"]

    def attach(self, sink: DirectReceiver, *, max_message_bytes: int, own_pings: bool) -> None:
        """See `DirectTransport`."""
        self.sink = sink
        came_before, self.queue = self.queue, ReceiverQueue(sink)
        self.writable = ALWAYS_WRITABLE
        self.request = self.response = None  # the handshake has ended, and nothing reads them again
        limit = self.conn.max_message_size
        self.max_message_bytes = max_message_bytes if limit is None else min(limit, max_message_bytes)
        # The parser counts a control frame between fragments as part of the message. So its limit includes one, and
        # this class rejects messages between the two limits.
        self.conn.max_message_size = self.max_message_bytes + MAX_CONTROL_BYTES
        for extension in self.conn.extensions:
            if isinstance(extension, PerMessageDeflate):
                self.window_bits = extension.local_max_window_bits
        self.own_pings = own_pings
        if own_pings:
            self.stop_keepalive()
        if self.read_paused:
            self.read_paused = False
            self.transport.resume_reading()
        while not came_before.empty():
            event = came_before.get_nowait()
            if event["type"] == "websocket.receive":
                text = event.get("text")
                sink.message_received(event["bytes"] if text is None else text)
            else:
                sink.connection_lost(event)

    def ping(self, payload: bytes) -> None:
        """See `DirectTransport`."""
        if not self.close_sent and not self.transport.is_closing():
            self.transport.write(frame_bytes(PING, payload))

    def close(self, code: int, reason: str) -> None:
        """See `DirectTransport`."""
        if self.close_sent or self.transport.is_closing():
            return
        if self.conn.state is not State.OPEN:
            return  # the client's close frame was read with the current message, and is answered next
        self.conn.send_close(code, reason)
        self._write_output()
        self.close_sent = True
        self.resume_reading()  # to read the client's answer
        if self.discarding:
            self._close_after_grace()
            return
        self.close_timer = self.loop.call_later(self.close_timeout, self.transport.close)

    # ── callbacks of asyncio ──

    def data_received(self, data: bytes) -> None:
        """Process received bytes."""
        if self.sink is not None:
            self.read(data)
            return
        if self.is_supported and self.handshake_initiated and not self.handshake_complete:
            # A client must not send before the answer to its handshake (RFC 6455 section 4.1). The parser would fail,
            # and uvicorn with it, because no frame can be sent yet. So these bytes are parsed after the answer.
            self.early_data += data
            self.transport.pause_reading()
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
        if self.sink is not None:
            self.sink = self.queue.sink = None  # breaks a reference cycle

    # ── callbacks of the parser ──

    def send_receive_event_to_app(self) -> None:
        """Process a complete message."""
        sink = self.sink
        if sink is None:
            try:
                super().send_receive_event_to_app()
            except InvalidState:  # text that is not UTF-8, in the same read as the close frame after it
                self.frames = []
            return
        data = self.frames[0] if len(self.frames) == 1 else b"".join(self.frames)
        self.frames = []
        self.fragments = 0
        if self.close_sent:
            return
        if len(data) > self.max_message_bytes:
            self._fail_too_big()
            return
        if self.curr_msg_data_type != "text":
            sink.message_received(bytes(data))
            return
        try:
            text = str(data, "utf-8")
        except UnicodeDecodeError:
            self.conn.fail(1007, "text is not UTF-8")
            self.handle_parser_exception()
        else:
            sink.message_received(text)

    def handle_cont(self, event: Any) -> None:
        """Process a fragment."""
        if self.sink is None:
            super().handle_cont(event)
            return
        if not self.fragments:
            self.fragment_bytes = sum(map(len, self.frames))
        self.fragments += 1
        self.fragment_bytes += len(event.data)
        if self.fragment_bytes > self.max_message_bytes:
            self._fail_too_big()
            return
        if len(self.frames) >= MAX_FRAGMENTS:
            self.frames = [b"".join(self.frames)]
        if event.data or event.fin:
            super().handle_cont(event)

    def _fail_too_big(self) -> None:
        if not self.close_sent:
            self.conn.fail(1009)
            self.handle_parser_exception()

    def handle_ping(self) -> None:
        """Process a ping. Its pong is ready to be sent."""
        if self.sink is None:
            super().handle_ping()
            return
        self.sink.ping_received()
        if self.write_paused or self.close_sent:
            # A client that floods pings and reads no pongs gets none. RFC 6455 section 5.5.3 allows the omission.
            self.conn.writes = [output for output in self.conn.writes if output[:1] != PONG_START]
        else:
            self._write_output()

    def handle_pong(self, event: Any) -> None:
        """Process a pong."""
        if self.sink is not None:
            self.sink.pong_received(bytes(event.data))
        super().handle_pong(event)

    def handle_parser_exception(self) -> None:
        """Process a protocol violation of the client. The close frame is ready to be sent.

        uvicorn closes the transport immediately. If unread bytes of the client are left, that is a TCP reset, which can
        overtake the close frame. So this method closes the sending half only, and discards received data for a moment.
        """
        if self.sink is None:
            super().handle_parser_exception()
            return
        if self.close_sent:
            self.transport.close()
            return
        sent: Any = self.conn.close_sent
        if sent.code == 1009:  # the parser's reason names its own limit, which includes a control frame
            self._replace_close_reason()
        self.queue.put_nowait({"type": "websocket.disconnect", "code": sent.code, "reason": sent.reason})
        self._write_output()
        self.close_sent = self.discarding = True
        self.frames = []
        self._close_after_grace()

    def _replace_close_reason(self) -> None:
        reason = f"message over {self.max_message_bytes} bytes"
        frame = frame_bytes(CLOSE, (1009).to_bytes(2, "big") + reason.encode())
        self.conn.writes = [frame if output[:1] == CLOSE_START else output for output in self.conn.writes]

    def _write_output(self) -> None:
        output = b"".join(self.conn.data_to_send())
        if output:
            self.transport.write(output)
