"""Delayed acknowledgements of received messages, the same for the server and the Python client."""

from __future__ import annotations

import asyncio
from typing import ClassVar

from fastapi_ws_stabilizer.wire.v1.frames import ACK_EVERY


class DelayedAcks:
    """Base of each side of `stabilizer.v1.json`: acknowledges after `ACK_EVERY` messages or after `ack_delay`.

    It is a base class, because an object of its own would cost memory for each connection and time for each message.

    Attributes:
        ack_delay: Maximum seconds from a message to its acknowledgement.
    """

    __slots__ = ("_ack_timer", "_unacknowledged")

    ack_delay: ClassVar[float]

    def __init__(self) -> None:
        self._unacknowledged = 0
        self._ack_timer: asyncio.TimerHandle | None = None

    def _schedule_ack(self) -> None:
        """Count a received message, and send its acknowledgement now or later."""
        self._unacknowledged += 1
        if self._unacknowledged >= ACK_EVERY:
            self._send_ack()
        elif self._ack_timer is None:
            self._ack_timer = asyncio.get_running_loop().call_later(self.ack_delay, self._send_ack)

    def _send_ack(self) -> None:
        """Acknowledge all received messages. It calls `_reset_ack`."""
        raise NotImplementedError

    def _reset_ack(self) -> None:
        """Stop the timer, because another frame acknowledges the messages or the connection ends."""
        self._unacknowledged = 0
        if self._ack_timer is not None:
            self._ack_timer.cancel()
            self._ack_timer = None
