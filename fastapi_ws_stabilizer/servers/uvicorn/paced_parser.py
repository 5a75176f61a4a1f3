"""Parser in slices for `StableWebSocketProtocol`.

The parser stops while the inbox is full, and yields to the event loop during a flood of data.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Final

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.servers.direct import DirectReceiver
from fastapi_ws_stabilizer.servers.uvicorn.compat import WebSocketsSansIOProtocol

CLOSE_GRACE: Final = 2.0
"""Seconds in which a client that violated the protocol can read the close frame before its connection is cut."""

MAX_PARSED_AT_ONCE: Final = 2048
"""Bytes that are parsed without a check of the inbox. Compressed bytes may inflate a thousandfold, and uncompressed
bytes may contain a few hundred frames."""

PARSE_SLICE: Final = 0.002
"""Seconds after which the parser yields to the event loop."""

FAST_PARSE: Final = 0.0002
"""Maximum parse time in seconds of a piece with few frames. The next piece is then twice as large."""

MAX_QUICK_PIECE: Final = 16 * 1024
"""Maximum size of such a piece in bytes. It is limited, because the piece may still contain many small frames."""

MAX_AFTER_END: Final = 4 * 1024
"""Bytes that are searched for the client's close frame after the server has ended the connection. Later bytes are a
flood, and are discarded."""

DISCARD_INTERVAL: Final = 0.01
"""Seconds between two reads of discarded bytes."""


class PacedParser(WebSocketsSansIOProtocol):
    """uvicorn's protocol with a parser that yields to other connections.

    Attributes:
        sink: The receiver; `None` before a connection is attached, and after its end.
        own_pings: Whether the receiver sends pings, so that uvicorn does not.
        discarding: Whether received data is discarded.
        reading_stopped: Whether the transport does not read, because the receiver or the parser has paused it.
        unparsed: Data that was read but not parsed.
        parse_later: Whether a call that parses it is scheduled.
        after_end: Number of bytes received since the receiver no longer wants messages.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sink: DirectReceiver | None = None
        self.own_pings = False
        self.discarding = False
        self.reading_stopped = False
        self.unparsed = b""
        self.parse_later = False
        self.after_end = 0

    def pause_reading(self) -> None:
        """See `DirectTransport`."""
        if not self.read_paused and not self.transport.is_closing():
            self.read_paused = self.reading_stopped = True
            self.transport.pause_reading()
            if not self.own_pings:
                self.stop_keepalive()  # its pongs would not be read

    def resume_reading(self) -> None:
        """See `DirectTransport`."""
        if self.read_paused:
            self.read_paused = False
            if self.unparsed:
                self._parse_soon()  # scheduled, because the inbox may be the caller
            else:
                self._continue_reading()

    def _continue_reading(self) -> None:
        self.reading_stopped = False
        if not self.transport.is_closing():
            self.transport.resume_reading()
            if not self.own_pings and self.ping_timer is None and self.pong_timer is None:
                self.start_keepalive()

    def read(self, data: bytes) -> None:
        """Process received bytes for the receiver. Hot path: `data` is nearly always small."""
        if self.discarding:
            self._discard()
        elif self.unparsed or len(data) > MAX_PARSED_AT_ONCE:
            self.unparsed += data
            if not self.parse_later:
                self._parse_rest()
        elif self._should_parse(len(data)):
            super().data_received(data)

    def _should_parse(self, size: int) -> bool:
        """Return whether to parse `size` more bytes.

        After the end of the connection, only the first `MAX_AFTER_END` bytes are parsed, to find the close frame.
        """
        if self.sink is None or self.sink.data_received():
            return True
        self.after_end += size
        if self.after_end > MAX_AFTER_END:
            self.discarding = True
            self.frames = []
            if self.close_sent:
                self._close_after_grace()
        return not self.discarding

    def _discard(self) -> None:
        """Keep reading at a limited rate, so that a client that is still writing reads the close frame."""
        if not self.transport.is_closing():
            self.transport.pause_reading()
            self.loop.call_later(DISCARD_INTERVAL, self._resume_discarding)

    def _resume_discarding(self) -> None:
        if not self.transport.is_closing():
            self.transport.resume_reading()

    def _close_after_grace(self) -> None:
        """Close the sending half, and discard received data while the client reads the close frame."""
        if self.close_timer is not None:
            self.close_timer.cancel()
        if self.transport.can_write_eof() and not self.transport.is_closing():
            with suppress(OSError):  # asyncio's own transport raises if the client has reset the connection
                self.transport.write_eof()
        self.close_timer = self.loop.call_later(CLOSE_GRACE, self.transport.close)

    def _parse_soon(self) -> None:
        if not self.parse_later:
            self.parse_later = True
            self.loop.call_soon(self._parse_rest)

    def _parse_rest(self) -> None:
        """Parse the read data in pieces until the inbox is full or the time slice has ended.

        Unparsed data waits, and the transport does not read until it is parsed.
        """
        self.parse_later = False
        rest = memoryview(self.unparsed)
        done, size = 0, MAX_PARSED_AT_ONCE
        began = now = monotonic()
        while done < len(rest) and not self.read_paused and not self.discarding and self.sink is not None:
            before, now = now, monotonic()
            if done and now - began >= PARSE_SLICE:
                break
            if done and now - before < FAST_PARSE and not self.conn.extensions:
                size = min(2 * size, MAX_QUICK_PIECE)  # the pieces seem to be parts of a large message
            else:
                size = MAX_PARSED_AT_ONCE
            piece = bytes(rest[done : done + size])
            done += len(piece)
            if self._should_parse(len(piece)):
                try:
                    super().data_received(piece)
                except Exception:  # the event loop does the same if it calls `data_received` itself
                    self.unparsed = b""
                    self.transport.abort()
                    raise
        self.unparsed = b"" if self.discarding or self.sink is None else bytes(rest[done:])
        if self.unparsed and not self.read_paused:
            if not self.reading_stopped and not self.transport.is_closing():
                self.reading_stopped = True
                self.transport.pause_reading()
            self._parse_soon()
        if self.reading_stopped and not self.read_paused and not self.unparsed:
            self._continue_reading()
