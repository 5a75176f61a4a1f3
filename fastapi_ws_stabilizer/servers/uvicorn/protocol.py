"""`StableWebSocketProtocol`: uvicorn's own WebSocket protocol, with a link for the connections of this library.

```
uvicorn app:app --ws fastapi_ws_stabilizer.servers.uvicorn:StableWebSocketProtocol
```

or `uvicorn.run(app, **manager.uvicorn_options())`. Other WebSocket routes are served as uvicorn serves them. So are
all routes if uvicorn's internals are not those that `uvicorn_internals` knows; that is logged once.

What is different for a connection that is attached:

- reading goes on while the application is busy, so pings, pongs and closes are seen; it stops when asked to;
- ping frames are sent and their pongs reported;
- bytes are written as they are given: framed, joined and compressed by the sender, once for all recipients;
- what is parsed goes straight to its inbox, without a queue and a task in between.

Parsing, the handshake and the closing handshake are uvicorn's and those of the `websockets` library.
"""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, Final

from websockets.exceptions import InvalidState
from websockets.extensions.permessage_deflate import PerMessageDeflate
from websockets.protocol import State

from fastapi_ws_stabilizer.servers.direct import EXTENSION, DirectReceiver
from fastapi_ws_stabilizer.servers.uvicorn.compat import ALWAYS_WRITABLE, ReceiverQueue, missing_internals
from fastapi_ws_stabilizer.servers.uvicorn.deflate import DEFLATE
from fastapi_ws_stabilizer.servers.uvicorn.paced_parser import CLOSE_GRACE, PacedParser
from fastapi_ws_stabilizer.wire.rfc6455 import CLOSE, PING, frame_bytes

MAX_FRAGMENTS: Final = 1024
"""Fragments of one message that are kept apart. Their number is bounded by nothing else: fragments may be empty."""

MAX_CONTROL_BYTES: Final = 125  # RFC 6455 section 5.5

PONG_START: Final = b"\x8a"  # the first byte of a whole pong frame
CLOSE_START: Final = b"\x88"  # and of a close frame


class StableWebSocketProtocol(PacedParser):
    """uvicorn's sans-I/O WebSocket protocol, and a `DirectTransport`. Made by uvicorn, one for each WebSocket."""

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
        self.early = b""
        self.known = not missing_internals(self)
        if self.known and self.config.ws_per_message_deflate:
            self.conn.available_extensions = [DEFLATE]

    async def send(self, message: Any) -> None:
        """As ASGI has it. Parses what came too early once the connection is accepted."""
        await super().send(message)
        if self.known and message["type"] == "websocket.http.response.body" and not message.get("more_body"):
            self.handshake_complete = True  # else uvicorn says for each refusal that the application has failed
        if self.early and self.handshake_complete:
            early, self.early = self.early, b""
            if not self.transport.is_closing():
                self.transport.resume_reading()
                self.data_received(early)

    def run_asgi(self) -> Coroutine[Any, Any, None]:
        """Run the application, and let it know what it is served by."""
        if self.known:
            self.scope["extensions"][EXTENSION] = {}
        return super().run_asgi()

    # ── the link ──

    @property
    def in_use(self) -> bool:
        """As `DirectTransport`."""
        return bool(getattr(self.queue, "_getters", ()) or getattr(self.writable, "_waiters", ()))

    def refuse_compression(self) -> None:
        """As `DirectTransport`."""
        self.conn.extensions = []
        if "Sec-WebSocket-Extensions" in self.response.headers:
            del self.response.headers["Sec-WebSocket-Extensions"]

    def attach(self, sink: DirectReceiver, *, max_message_bytes: int, own_pings: bool) -> None:
        """As `DirectTransport`."""
        self.sink = sink
        came_before, self.queue = self.queue, ReceiverQueue(sink)
        self.writable = ALWAYS_WRITABLE
        self.request = self.response = None  # the handshake is over; nobody looks at them again
        limit = self.conn.max_message_size
        self.max_message_bytes = max_message_bytes if limit is None else min(limit, max_message_bytes)
        # The parser counts a control frame between fragments as part of the message. So it gets room for one, and what
        # that lets through is refused here.
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
        """As `DirectTransport`."""
        if not self.close_sent and not self.transport.is_closing():
            self.transport.write(frame_bytes(PING, payload))

    def close(self, code: int, reason: str) -> None:
        """As `DirectTransport`."""
        if self.close_sent or self.transport.is_closing():
            return
        if self.conn.state is not State.OPEN:
            return  # the client's close frame was read with the message that led here, and is answered next
        self.conn.send_close(code, reason)
        self._write_output()
        self.close_sent = True
        self.resume_reading()  # for the client's answer
        if self.parting:
            self._close_after_grace()
            return
        self.close_timer = self.loop.call_later(self.close_timeout, self.transport.close)

    # ── what the network tells ──

    def data_received(self, data: bytes) -> None:
        """Bytes have come in."""
        if self.sink is not None:
            self.read(data)
            return
        if self.known and self.handshake_initiated and not self.handshake_complete:
            # Before its handshake is answered a client has nothing to say (RFC 6455 section 4.1), and no frame can
            # answer it: the parser fails, and uvicorn with it. So this is read when there is an answer.
            self.early += data
            self.transport.pause_reading()
            return
        try:
            super().data_received(data)
        except UnicodeEncodeError:  # websockets before 17 lets a path and headers through that are not ASCII
            if not self.known:
                raise
            is_bad = True
        else:
            is_bad = self.conn.handshake_exc is not None and not self.handshake_initiated
        if self.known and is_bad:
            # What the HTTP parser has let through is no handshake: uvicorn would neither answer nor close.
            self.handshake_initiated = self.close_sent = True
            self.transport.write(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
            self.transport.close()

    def pause_writing(self) -> None:
        """The transport holds enough."""
        self.write_paused = True
        if self.sink is None:
            super().pause_writing()
        else:
            self.sink.pause_writing()

    def resume_writing(self) -> None:
        """The transport takes more."""
        self.write_paused = False
        if self.sink is None:
            super().resume_writing()
        else:
            self.sink.resume_writing()

    def shutdown(self) -> None:
        """The server stops: it sends 1012 next."""
        if self.known and self.transport.is_closing():
            # It has a close frame or is broken, and perhaps a client that does not read. uvicorn would close it again,
            # which raises, and everybody else would go without a goodbye.
            self.stop_keepalive()
            self.loop.call_later(CLOSE_GRACE, self.transport.abort)
            return
        if self.sink is not None and not self.close_sent:
            self.sink.before_shutdown()
        super().shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        """The transport is gone."""
        if self.sink is not None and (said := self.conn.close_rcvd) is not None:
            # uvicorn tells of it while it can answer; this one came behind what a full inbox has held up.
            self.queue.put_nowait({"type": "websocket.disconnect", "code": said.code, "reason": said.reason})
        super().connection_lost(exc)
        if self.known and self.sink is None:  # one for each who waits: a reader from before, and ours
            self.queue.put_nowait({"type": "websocket.disconnect", "code": 1005})
        if self.sink is not None:
            self.sink = self.queue.sink = None  # the two know each other, and nobody else needs to collect them

    # ── what the parser tells ──

    def send_receive_event_to_app(self) -> None:
        """A message is complete."""
        sink = self.sink
        if sink is None:
            try:
                super().send_receive_event_to_app()
            except InvalidState:  # text that is not UTF-8, read at one go with the close frame behind it
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
            self.conn.fail(1007, "text that is not UTF-8")
            self.handle_parser_exception()
        else:
            sink.message_received(text)

    def handle_cont(self, event: Any) -> None:
        """A fragment has come in."""
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
        """A ping has come in, and its pong lies ready."""
        if self.sink is None:
            super().handle_ping()
            return
        self.sink.ping_received()
        if self.write_paused or self.close_sent:
            # A client that floods pings and reads no pongs gets none; RFC 6455 section 5.5.3 allows to leave some out.
            self.conn.writes = [output for output in self.conn.writes if output[:1] != PONG_START]
        else:
            self._write_output()

    def handle_pong(self, event: Any) -> None:
        """A pong has come in."""
        if self.sink is not None:
            self.sink.pong_received(bytes(event.data))
        super().handle_pong(event)

    def handle_parser_exception(self) -> None:
        """The client broke the protocol, and the close frame that says so lies ready.

        uvicorn closes the transport at once. With bytes of the client still unread that is a TCP reset, which can
        overtake the close frame. So only our half is closed, and what comes in is thrown away for a moment.
        """
        if self.sink is None:
            super().handle_parser_exception()
            return
        if self.close_sent:
            self.transport.close()
            return
        how: Any = self.conn.close_sent
        if how.code == 1009:  # the parser names its own limit, which has room for a control frame
            self._say_too_big()
        self.queue.put_nowait({"type": "websocket.disconnect", "code": how.code, "reason": how.reason})
        self._write_output()
        self.close_sent = self.parting = True
        self.frames = []
        self._close_after_grace()

    def _say_too_big(self) -> None:
        text = f"message over {self.max_message_bytes} bytes"
        frame = frame_bytes(CLOSE, (1009).to_bytes(2, "big") + text.encode())
        self.conn.writes = [frame if output[:1] == CLOSE_START else output for output in self.conn.writes]

    def _write_output(self) -> None:
        output = b"".join(self.conn.data_to_send())
        if output:
            self.transport.write(output)
