"""Recipient interface of the hub."""

from __future__ import annotations

import contextvars
from typing import Any, Protocol

from fastapi_ws_stabilizer.close_codes import CloseInfo, DisconnectReason
from fastapi_ws_stabilizer.connection.liveness import Liveness
from fastapi_ws_stabilizer.memory.budget import Evictable
from fastapi_ws_stabilizer.queueing import SendQueueLike
from fastapi_ws_stabilizer.wire.encoded import EncodedMessage


class Recipient(Evictable, Protocol):
    """One connection or session as the hub uses it. No method waits."""

    client_id: str
    shard: int
    liveness: Liveness

    @property
    def recipient(self) -> Any:
        """The recipient in rooms and broadcasts: this connection, or its session."""

    @property
    def outbox(self) -> SendQueueLike:
        """Outbox with the messages that wait to be sent."""

    @property
    def close_info(self) -> CloseInfo | None:
        """Close info; `None` while it is open."""

    @property
    def reading_paused(self) -> bool:
        """Whether the server has paused reading, so that nothing is received."""

    @property
    def context(self) -> contextvars.Context | None:
        """Context variables of the handshake, while the connection is open."""

    @property
    def pings_by_protocol(self) -> bool:
        """Whether the server can send ping frames, which every client answers automatically."""

    @property
    def socket(self) -> Any:
        """Socket object of user code."""

    def ping(self, frame: EncodedMessage | None, now: float) -> bool:
        """Send a heartbeat frame, or a protocol ping for `None`; `False` if the outbox is full."""

    def has_backlog(self) -> bool:
        """Whether messages wait to be sent, so that a ping behind them cannot be answered yet."""

    def unsent_bytes(self) -> int | None:
        """Bytes that were written but not acknowledged by the client's TCP stack; `None` if unknown."""

    def send_progress(self) -> int | None:
        """Number that increases as the client's TCP stack accepts bytes; `None` if unknown."""

    def seconds_since_received(self) -> float | None:
        """Seconds since bytes last arrived, even part of a message; `None` if unknown."""

    def consume_activity(self) -> bool:
        """Whether a message was sent or received since the last call."""

    def request_drain(self, after: float, within: float, why: DisconnectReason) -> bool:
        """Ask the client to leave and reconnect; `False` if it cannot be asked.

        Args:
            after: Seconds until it should leave.
            within: Seconds until it is closed if it has not left.
            why: Cause of the close if the client leaves.
        """

    def close(
        self,
        cause: DisconnectReason,
        *,
        code: int | None = None,
        reason: str | None = None,
        from_outside: bool = False,
    ) -> bool:
        """Begin to close; `False` if it has begun already."""
