"""How `StableWebSocketProtocol` reads: piece by piece, so that a full inbox stops it and nobody waits for a flood."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Final

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.servers.direct import DirectReceiver
from fastapi_ws_stabilizer.servers.uvicorn.compat import WebSocketsSansIOProtocol

CLOSE_GRACE: Final = 2.0
"""Seconds in which a client that broke the protocol can read why, before its connection is cut."""

MAX_PARSED_AT_ONCE: Final = 2048
"""Bytes that are parsed at one go, so that a full inbox stops them. Compressed ones may be a thousand times as many;
others may be some hundred frames."""

PARSE_SLICE: Final = 0.002
"""Seconds after which others have their turn before more of one read is parsed."""

FAST_PARSE: Final = 0.0002
"""Seconds in which a piece is parsed that holds few frames. The next one is twice as large then."""

MAX_QUICK_PIECE: Final = 16 * 1024
"""Bytes of the largest of them, in which there may be many small frames all the same."""

MAX_AFTER_END: Final = 4 * 1024
"""Bytes that are looked at for the client's close frame after we have ended its connection. What comes behind them is a
flood, and is thrown away."""

DISCARD_INTERVAL: Final = 0.01
"""Seconds between two reads of it."""


class PacedParser(WebSocketsSansIOProtocol):
    """uvicorn's protocol, which parses what comes in for a sink at a pace that others can live with.

    Attributes:
        sink: Who gets it; `None` before a connection is attached, and after its end.
        own_pings: Whether the sink sends pings, so that uvicorn need not.
        parting: Whether what still comes in is thrown away.
        reading_stopped: Whether the transport is not read from, because somebody does not want more or not now.
        unparsed: What was read and waits to be parsed.
        parse_later: Whether that is going to be looked at.
        after_end: Bytes that have come since nobody wants them any more.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sink: DirectReceiver | None = None
        self.own_pings = False
        self.parting = False
        self.reading_stopped = False
        self.unparsed = b""
        self.parse_later = False
        self.after_end = 0

    def pause_reading(self) -> None:
        """As `DirectTransport`."""
        if not self.read_paused and not self.transport.is_closing():
            self.read_paused = self.reading_stopped = True
            self.transport.pause_reading()
            if not self.own_pings:
                self.stop_keepalive()  # whose pongs would not be read

    def resume_reading(self) -> None:
        """As `DirectTransport`."""
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

    def read(self, data: bytes) -> None:
        """Bytes have come in for the sink. Hot path: nearly always they are few, and nothing is unusual."""
        if self.parting:
            self._discard()
        elif self.unparsed or len(data) > MAX_PARSED_AT_ONCE:
            self.unparsed += data
            if not self.parse_later:
                self._parse_rest()
        elif self._looks_at(len(data)):
            super().data_received(data)

    def _looks_at(self, size: int) -> bool:
        """Whether so many bytes more are parsed. After our end there may be a close frame in them, if they are few."""
        if self.sink is None or self.sink.data_received():
            return True
        self.after_end += size
        if self.after_end > MAX_AFTER_END:
            self.parting = True
            self.frames = []
            if self.close_sent:
                self._close_after_grace()
        return not self.parting

    def _discard(self) -> None:
        """Read on, so that a client that was writing comes to our close frame, but not as fast as one can flood."""
        if not self.transport.is_closing():
            self.transport.pause_reading()
            self.loop.call_later(DISCARD_INTERVAL, self._discard_more)

    def _discard_more(self) -> None:
        if not self.transport.is_closing():
            self.transport.resume_reading()

    def _close_after_grace(self) -> None:
        """Close our half, and let the client read why for a moment, while what it sends is thrown away."""
        if self.close_timer is not None:
            self.close_timer.cancel()
        if self.transport.can_write_eof() and not self.transport.is_closing():
            with suppress(OSError):  # asyncio's own transport raises for a connection that its client has reset
                self.transport.write_eof()
        self.close_timer = self.loop.call_later(CLOSE_GRACE, self.transport.close)

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
            if done and now - began >= PARSE_SLICE:
                break
            if (
                done and now - before < FAST_PARSE and not self.conn.extensions
            ):  # a part of a large message, as it seems
                size = min(2 * size, MAX_QUICK_PIECE)
            else:
                size = MAX_PARSED_AT_ONCE
            piece = bytes(rest[done : done + size])
            done += len(piece)
            if self._looks_at(len(piece)):
                try:
                    super().data_received(piece)
                except Exception:  # as the event loop does where it has called us itself
                    self.unparsed = b""
                    self.transport.abort()
                    raise
        self.unparsed = b"" if self.parting or self.sink is None else bytes(rest[done:])
        if self.unparsed and not self.read_paused:
            if not self.reading_stopped and not self.transport.is_closing():
                self.reading_stopped = True
                self.transport.pause_reading()
            self._parse_soon()
        if self.reading_stopped and not self.read_paused and not self.unparsed:
            self._read_on()
