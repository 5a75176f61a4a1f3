"""Writer of one connection of a client."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

from fastapi_ws_stabilizer.client.send_buffer import SendBuffer
from fastapi_ws_stabilizer.client.transport import Transport
from fastapi_ws_stabilizer.tasks import wait_for_all
from fastapi_ws_stabilizer.wire.v1.frames import deflated

MAX_PENDING_CONTROL: Final = 64
"""Maximum number of queued frames that are not in the send buffer."""


class FrameWriter:
    """Writer of one connection: unbuffered frames first, then the messages of the send buffer.

    Args:
        buffer: The send buffer of the session.

    Attributes:
        deflates: Whether messages are compressed.
    """

    def __init__(self, buffer: SendBuffer) -> None:
        self.deflates = False
        self._buffer = buffer
        self._unbuffered: deque[str | bytes] = deque(maxlen=MAX_PENDING_CONTROL)
        self._stopped = False
        self._pause: asyncio.TimerHandle | None = None
        self._idle: asyncio.Future[None] | None = None  # done when everything that can be sent is written

    @property
    def is_backpressured(self) -> bool:
        """Whether the network has not taken so many unbuffered frames that a further one would drop the oldest."""
        return len(self._unbuffered) >= MAX_PENDING_CONTROL

    def put(self, frame: str | bytes) -> None:
        """Queue an unbuffered frame ahead of the messages. If too many wait, the oldest is dropped."""
        self._unbuffered.append(frame)
        self._buffer.ready.set()

    def pause_messages(self, seconds: float) -> None:
        """Write no message of the send buffer for some time."""
        self._stop_pause()
        self._pause = asyncio.get_running_loop().call_later(seconds, self._resume)

    def _resume(self) -> None:
        self._pause = None
        self._buffer.ready.set()

    def _stop_pause(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None

    async def flush(self, timeout: float) -> None:
        """Wait until all frames that can be sent are written, at most `timeout` seconds. Cancelling is safe."""
        if not self._stopped:
            if self._idle is None or self._idle.done():  # otherwise another call waits for the same future
                self._idle = asyncio.get_running_loop().create_future()
            self._buffer.ready.set()  # the writer confirms that it has nothing to write
            await wait_for_all([self._idle], timeout)

    def stop(self) -> None:
        """Write nothing more. A frame that the network takes now is still written."""
        self._stopped = True
        self._stop_pause()
        self._confirm_idle()
        self._buffer.ready.set()

    async def run(self, transport: Transport) -> None:
        """Write until `stop` is called.

        Raises:
            TransportClosedError: The WebSocket is closed.
        """
        while not self._stopped:
            frame = self._next_frame()
            if frame is not None:
                await transport.send(frame)
                continue
            self._confirm_idle()
            self._buffer.ready.clear()
            await self._buffer.ready.wait()

    def _next_frame(self) -> str | bytes | None:
        if self._unbuffered:
            return self._unbuffered.popleft()
        message = None if self._pause is not None else self._buffer.pop_next()
        if message is None:
            return None
        frame = message.frame()
        if self.deflates and isinstance(frame, str):
            return deflated(frame) or frame
        return frame

    def _confirm_idle(self) -> None:
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)
