"""Parsing of a connection not all at once: in slices, with pauses, or only until its close frame is found."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Final

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.compat.uvicorn import PushedEvents
from fastapi_ws_stabilizer.servers.direct import DirectReceiver
from fastapi_ws_stabilizer.servers.uvicorn.compat import WebSocketsSansIOProtocol
from fastapi_ws_stabilizer.servers.uvicorn.frame_parser import FrameParser

CLOSE_GRACE: Final = 2.0
"""Seconds in which a client that violated the protocol can read the close frame before its connection is cut."""

MAX_UNPACED_BYTES: Final = 2048
"""Maximum size in bytes of a read that is parsed in one go. It has at most 341 frames, about 1 ms of work."""

PARSE_SLICE: Final = 0.002
"""Seconds after which the parser yields to the event loop."""

MAX_AFTER_END: Final = 4 * 1024
"""Bytes that are searched for the client's close frame after the server has ended the connection. Later bytes are a
flood, and are discarded."""

DISCARD_INTERVAL: Final = 0.01
"""Seconds between two reads of discarded bytes."""


class PacedParser:
    """Control of the parser of one connection, from the first large read, pause or end of the connection.

    Args:
        protocol: The protocol of the connection.
        parser: Its parser.
        sink: Its receiver.
        events: Its queue, which holds the messages that came before the attach and found no room.
        handle_frames: Function that handles parsed frames until a time, and returns whether frames may be left.

    Attributes:
        discarding: Whether received data is discarded.
    """

    __slots__ = (
        "_after_end",
        "_events",
        "_handle_frames",
        "_parser",
        "_protocol",
        "_reading_stopped",
        "_scheduled",
        "_sink",
        "discarding",
    )

    def __init__(
        self,
        protocol: WebSocketsSansIOProtocol,
        parser: FrameParser,
        sink: DirectReceiver,
        events: PushedEvents,
        handle_frames: Callable[[FrameParser, float], bool],
    ) -> None:
        self._protocol = protocol
        self._parser = parser
        self._sink = sink
        self._events = events
        self._handle_frames = handle_frames
        self._after_end = 0  # bytes received since the receiver no longer wants messages
        self._reading_stopped = False  # whether the transport does not read
        self._scheduled = False  # whether a slice is
        self.discarding = False

    def data_received(self, data: bytes) -> None:
        """Parse received bytes, or discard them."""
        if self.discarding:
            self._discard_slowly()
            return
        is_flood = False
        if not self._sink.data_received():
            room = MAX_AFTER_END - self._after_end
            is_flood = len(data) > room
            data = data[:room]
            self._after_end += len(data)
        self._parser.feed(data)
        if not self._scheduled:
            self._parse_slice()
        if is_flood:
            self.discard()

    def stop_reading(self) -> None:
        """Stop the transport. Parsing stops because the protocol has `read_paused` set."""
        if not self._protocol.transport.is_closing():
            self._reading_stopped = True
            self._protocol.transport.pause_reading()

    def resume_reading(self) -> None:
        """Parse what has arrived, then let the transport read."""
        if not self._scheduled:  # scheduled, because the caller may be the inbox
            self._scheduled = True
            self._protocol.loop.call_soon(self._parse_slice)

    def _parse_slice(self) -> None:
        """Pass on held messages, then parse until reading is paused or the time slice has ended.

        Unparsed data waits, and the transport does not read until it is parsed.
        """
        self._scheduled = False
        protocol = self._protocol
        if protocol.read_paused or not self._events.release():
            return
        try:
            has_rest = self._handle_frames(self._parser, monotonic() + PARSE_SLICE)
        except Exception:  # the event loop does the same if it calls `data_received` itself
            self._parser.end()
            protocol.transport.abort()
            raise
        if protocol.read_paused:
            return
        if has_rest:
            if not self._reading_stopped:
                self.stop_reading()
            self.resume_reading()
        elif self._reading_stopped:
            self._reading_stopped = False
            if not protocol.transport.is_closing():
                protocol.transport.resume_reading()

    def discard(self) -> None:
        """Discard all further data, and close the transport soon if the close frame was sent."""
        self.discarding = True
        self._parser.end()
        if self._protocol.close_sent:
            self.close_after_grace()

    def _discard_slowly(self) -> None:
        """Keep reading at a limited rate, so that a client that is still writing reads the close frame."""
        if not self._protocol.transport.is_closing():
            self._protocol.transport.pause_reading()
            self._protocol.loop.call_later(DISCARD_INTERVAL, self._resume_discarding)

    def _resume_discarding(self) -> None:
        if not self._protocol.transport.is_closing():
            self._protocol.transport.resume_reading()

    def close_after_grace(self) -> None:
        """Close the sending half, and discard received data while the client reads the close frame."""
        protocol = self._protocol
        if protocol.close_timer is not None:
            protocol.close_timer.cancel()
        if protocol.transport.can_write_eof() and not protocol.transport.is_closing():
            with suppress(OSError):  # asyncio's own transport raises if the client has reset the connection
                protocol.transport.write_eof()
        protocol.close_timer = protocol.loop.call_later(CLOSE_GRACE, protocol.transport.close)
