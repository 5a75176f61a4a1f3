"""`StableWebSocketProtocol`: uvicorn's own WebSocket protocol, with a link for the connections of this library.

```
uvicorn app:app --ws fastapi_ws_stabilizer.servers.uvicorn:StableWebSocketProtocol
```

or `uvicorn.run(app, **manager.uvicorn_options())`. Other WebSocket routes are served as uvicorn serves them. So are
all routes if uvicorn's internals are not those that this module knows; that is logged once.

What is different for a connection that is attached:

- reading goes on while the application is busy, so pings, pongs and closes are seen; it stops when asked to;
- ping frames are sent and their pongs reported;
- bytes are written as they are given: framed, joined and compressed by the sender, once for all recipients;
- what is parsed goes straight to its inbox, without a queue and a task in between.

Parsing, the handshake and the closing handshake are uvicorn's and those of the `websockets` library.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Coroutine
from typing import Any, Final

import uvicorn
from websockets.exceptions import InvalidState
from websockets.extensions.permessage_deflate import PerMessageDeflate

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.servers.deflate import DEFLATE
from fastapi_ws_stabilizer.servers.link import EXTENSION, Sink
from fastapi_ws_stabilizer.wire.framing import CLOSE, PING, frame_bytes

try:
    from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
except ImportError as missing:
    raise ImportError(
        f"StableWebSocketProtocol needs uvicorn 0.35 or newer with the websockets library, and this is uvicorn "
        f'{uvicorn.__version__}: pip install -U "fastapi-ws-stabilizer[uvicorn]"'
    ) from missing

logger = logging.getLogger("fastapi_ws_stabilizer")

MAX_FRAGMENTS: Final = 1024
"""Fragments of one message that are kept apart. Their number is bounded by nothing else: fragments may be empty."""

MAX_CONTROL_BYTES: Final = 125  # RFC 6455 section 5.5

PONG_START: Final = b"\x8a"  # the first byte of a whole pong frame
CLOSE_START: Final = b"\x88"  # and of a close frame

FAREWELL: Final = 2.0
"""Seconds in which a client that broke the protocol can read why, before its connection is cut."""

MAX_PARSED_AT_ONCE: Final = 2048
"""Bytes that are parsed at one go, so that a full inbox stops them. Compressed ones may be a thousand times as many;
others may be some hundred frames."""

SLICE: Final = 0.002
"""Seconds after which others have their turn before more of one read is parsed."""

QUICK: Final = 0.0002
"""Seconds in which a piece is parsed that holds few frames. The next one is twice as large then."""

MAX_QUICK_PIECE: Final = 16 * 1024
"""Bytes of the largest of them, in which there may be many small frames all the same."""

MAX_AFTER_END: Final = 4 * 1024
"""Bytes that are looked at for the client's close frame after we have ended its connection. What comes behind them is a
flood, and is thrown away."""

THROW_AWAY_EVERY: Final = 0.01
"""Seconds between two reads of it."""

_OURS: Final = (
    "queue",
    "conn",
    "config",
    "loop",
    "transport",
    "curr_msg_data_type",
    "handshake_complete",
    "handshake_initiated",
    "writable",
    "close_sent",
    "close_timer",
    "close_timeout",
    "read_paused",
    "frames",
    "ping_timer",
    "pong_timer",
)
_OURS_OF_CONN: Final = (
    "available_extensions",
    "extensions",
    "max_message_size",
    "close_sent",
    "close_rcvd",
    "fail",
    "parser_exc",
    "handshake_exc",
    "writes",
)
_METHODS: Final = (
    "handle_cont",
    "handle_parser_exception",
    "handle_ping",
    "handle_pong",
    "run_asgi",
    "send_receive_event_to_app",
    "start_keepalive",
    "stop_keepalive",
)


class _ToSink:
    """Stands where uvicorn has a queue: what uvicorn puts into it, its disconnect events, goes to the sink."""

    __slots__ = ("sink",)

    def __init__(self, sink: Sink) -> None:
        self.sink: Sink | None = sink

    def put_nowait(self, event: dict[str, Any]) -> None:
        if self.sink is not None:
            self.sink.gone(event)

    def empty(self) -> bool:
        return True

    async def get(self) -> Any:
        raise RuntimeError("this WebSocket is read by fastapi-ws-stabilizer: read from its StableSocket")


class _AlwaysWritable:
    """Stands where uvicorn has an event that its `send` waits for: what waits for the transport is in an outbox."""

    async def wait(self) -> bool:
        return True

    def set(self) -> None:
        pass

    def clear(self) -> None:
        pass


_ALWAYS_WRITABLE: Final = _AlwaysWritable()


class StableWebSocketProtocol(WebSocketsSansIOProtocol):
    """uvicorn's sans-I/O WebSocket protocol, and a `Link`. Made by uvicorn, one for each WebSocket."""

    queue: Any
    request: Any
    response: Any
    writable: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sink: Sink | None = None
        self.write_paused = False
        self.window_bits = 0
        self.max_message_bytes = 0
        self.fragments = 0
        self.fragment_bytes = 0
        self.own_pings = False
        self.parting = False
        self.reading_stopped = False
        self.unparsed = b""
        self.early = b""
        self.parse_later = False
        self.after_end = 0
        self.known = not _unknown_internals(self)
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
        """As `Link`."""
        return bool(getattr(self.queue, "_getters", ()) or getattr(self.writable, "_waiters", ()))

    def refuse_compression(self) -> None:
        """As `Link`."""
        self.conn.extensions = []
        if "Sec-WebSocket-Extensions" in self.response.headers:
            del self.response.headers["Sec-WebSocket-Extensions"]

    def attach(self, sink: Sink, *, max_message_bytes: int, own_pings: bool) -> None:
        """As `Link`."""
        self.sink = sink
        came_before, self.queue = self.queue, _ToSink(sink)
        self.writable = _ALWAYS_WRITABLE
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
                sink.received(event["bytes"] if text is None else text)
            else:
                sink.gone(event)

    def ping(self, payload: bytes) -> None:
        """As `Link`."""
        if not self.close_sent and not self.transport.is_closing():
            self.transport.write(frame_bytes(PING, payload))

    def close(self, code: int, reason: str) -> None:
        """As `Link`."""
        if self.close_sent or self.transport.is_closing():
            return
        self.conn.send_close(code, reason)
        self._write_output()
        self.close_sent = True
        self.resume_reading()  # for the client's answer
        if self.parting:
            self._farewell()
            return
        self.close_timer = self.loop.call_later(self.close_timeout, self.transport.close)

    def pause_reading(self) -> None:
        """As `Link`."""
        if not self.read_paused and not self.transport.is_closing():
            self.read_paused = self.reading_stopped = True
            self.transport.pause_reading()
            if not self.own_pings:
                self.stop_keepalive()  # whose pongs would not be read

    def resume_reading(self) -> None:
        """As `Link`."""
        if self.read_paused:
            self.read_paused = False
            if self.unparsed:
                self._parse_soon()  # not here: we may be called from within the inbox
            else:
                self._read_on()

    def _read_on(self) -> None:
        self.reading_stopped = False
        if not self.transport.is_closing():
            self.transport.resume_reading()
            if not self.own_pings and self.ping_timer is None and self.pong_timer is None:
                self.start_keepalive()

    # ── what the network tells ──

    def data_received(self, data: bytes) -> None:
        """Bytes have come in."""
        if self.known and self.handshake_initiated and not self.handshake_complete:
            # Before its handshake is answered a client has nothing to say (RFC 6455 section 4.1), and no frame can
            # answer it: the parser fails, and uvicorn with it. So this is read when there is an answer.
            self.early += data
            self.transport.pause_reading()
            return
        if self.sink is not None:
            if self.parting:
                self._throw_away()
                return
            if self.unparsed or len(data) > MAX_PARSED_AT_ONCE:
                self.unparsed += data
                if not self.parse_later:
                    self._parse_rest()
                return
            if not self._looks_at(len(data)):
                return
        try:
            super().data_received(data)
        except UnicodeEncodeError:  # websockets before 17 cannot say what is wrong with a header that is not ASCII
            if self.handshake_initiated or self.conn.handshake_exc is None:
                raise
        if self.known and self.conn.handshake_exc is not None and not self.handshake_initiated:
            # What the HTTP parser has let through is no handshake: uvicorn would neither answer nor close.
            self.handshake_initiated = self.close_sent = True
            self.transport.write(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
            self.transport.close()

    def _looks_at(self, size: int) -> bool:
        """Whether so many bytes more are parsed. After our end there may be a close frame in them, if they are few."""
        if self.sink is not None and not self.sink.heard():
            self.after_end += size
            if self.after_end > MAX_AFTER_END:
                self.parting = True
                self.frames = []
                if self.close_sent:
                    self._farewell()
        return not self.parting

    def _throw_away(self) -> None:
        """Read on, so that a client that was writing comes to our close frame, but not as fast as one can flood."""
        if not self.transport.is_closing():
            self.transport.pause_reading()
            self.loop.call_later(THROW_AWAY_EVERY, self._throw_more_away)

    def _throw_more_away(self) -> None:
        if not self.transport.is_closing():
            self.transport.resume_reading()

    def _farewell(self) -> None:
        """Close our half, and let the client read why for a moment, while what it sends is thrown away."""
        if self.close_timer is not None:
            self.close_timer.cancel()
        if self.transport.can_write_eof() and not self.transport.is_closing():
            self.transport.write_eof()
        self.close_timer = self.loop.call_later(FAREWELL, self.transport.close)

    def _parse_soon(self) -> None:
        if not self.parse_later:
            self.parse_later = True
            self.loop.call_soon(self._parse_rest)

    def _parse_rest(self) -> None:
        """Parse what came in, piece by piece, until the inbox is full, or others have waited for long enough.

        What was read and not parsed waits, and no more is read meanwhile.
        """
        self.parse_later = False
        rest = memoryview(self.unparsed)
        done, size = 0, MAX_PARSED_AT_ONCE
        began = now = monotonic()
        while done < len(rest) and not self.read_paused and not self.parting and self.sink is not None:
            before, now = now, monotonic()
            if now - began >= SLICE:
                break
            if done and now - before < QUICK and not self.conn.extensions:  # a part of a large message, as it seems
                size = min(2 * size, MAX_QUICK_PIECE)
            else:
                size = MAX_PARSED_AT_ONCE
            piece = bytes(rest[done : done + size])
            done += len(piece)
            if self._looks_at(len(piece)):
                super().data_received(piece)
        self.unparsed = b"" if self.parting or self.sink is None else bytes(rest[done:])
        if self.unparsed and not self.read_paused:
            if not self.reading_stopped and not self.transport.is_closing():
                self.reading_stopped = True
                self.transport.pause_reading()
            self._parse_soon()
        if self.reading_stopped and not self.read_paused and not self.unparsed:
            self._read_on()

    def pause_writing(self) -> None:
        """The transport holds enough."""
        self.write_paused = True
        if self.sink is None:
            super().pause_writing()
        else:
            self.sink.write_paused()

    def resume_writing(self) -> None:
        """The transport takes more."""
        self.write_paused = False
        if self.sink is None:
            super().resume_writing()
        else:
            self.sink.writable()

    def shutdown(self) -> None:
        """The server stops: it sends 1012 next."""
        if self.known and self.transport.is_closing():
            # It has a close frame or is broken, and perhaps a client that does not read. uvicorn would close it again,
            # which raises, and everybody else would go without a goodbye.
            self.stop_keepalive()
            self.loop.call_later(FAREWELL, self.transport.abort)
            return
        if self.sink is not None and not self.close_sent:
            self.sink.last_call()
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
            self._too_big()
            return
        if self.curr_msg_data_type != "text":
            sink.received(bytes(data))
            return
        try:
            text = str(data, "utf-8")
        except UnicodeDecodeError:
            self.conn.fail(1007, "text that is not UTF-8")
            self.handle_parser_exception()
        else:
            sink.received(text)

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
            self._too_big()
            return
        if len(self.frames) >= MAX_FRAGMENTS:
            self.frames = [b"".join(self.frames)]
        if event.data or event.fin:
            super().handle_cont(event)

    def _too_big(self) -> None:
        if not self.close_sent:
            self.conn.fail(1009)
            self.handle_parser_exception()

    def handle_ping(self) -> None:
        """A ping has come in, and its pong lies ready."""
        if self.sink is None:
            super().handle_ping()
            return
        self.sink.pinged()
        if self.write_paused or self.close_sent:
            # A client that floods pings and reads no pongs gets none; RFC 6455 section 5.5.3 allows to leave some out.
            self.conn.writes = [output for output in self.conn.writes if output[:1] != PONG_START]
        else:
            self._write_output()

    def handle_pong(self, event: Any) -> None:
        """A pong has come in."""
        if self.sink is not None:
            self.sink.ponged(bytes(event.data))
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
        self._farewell()

    def _say_too_big(self) -> None:
        text = f"message over {self.max_message_bytes} bytes"
        frame = frame_bytes(CLOSE, (1009).to_bytes(2, "big") + text.encode())
        self.conn.writes = [frame if output[:1] == CLOSE_START else output for output in self.conn.writes]

    def _write_output(self) -> None:
        output = b"".join(self.conn.data_to_send())
        if output:
            self.transport.write(output)


@functools.cache
def _say_once(missing: tuple[str, ...]) -> None:
    logger.warning(
        "uvicorn %s is not built as StableWebSocketProtocol knows it (%s): it works as uvicorn's own protocol, "
        "without ping frames, prepared frames and compression that is done once",
        uvicorn.__version__,
        ", ".join(missing),
        extra={"event": "uvicorn_internals_unknown", "missing": list(missing)},
    )


def _unknown_internals(protocol: Any) -> bool:
    """Whether something of uvicorn's protocol that we stand on is not there; says so once."""
    conn = getattr(protocol, "conn", None)
    missing = (
        *(name for name in _OURS if not hasattr(protocol, name)),
        *(f"conn.{name}" for name in _OURS_OF_CONN if not hasattr(conn, name)),
        *(name for name in _METHODS if not hasattr(WebSocketsSansIOProtocol, name)),
    )
    if missing:
        _say_once(missing)
    return bool(missing)
