"""Callbacks of an outbox, and the states of a slow consumer."""

from __future__ import annotations

import contextvars
from enum import Enum
from typing import Protocol


class SlowConsumer(str, Enum):
    """State of a slow consumer. Each is reported once until the client has caught up."""

    LAGGING = "lagging"
    """More than half of its outbox is used, and the network accepts nothing."""
    DROPPING = "dropping"
    """Messages to it are dropped, as `outbox_overflow` says."""
    DISCONNECTED = "disconnected"
    """Its outbox was full, and the server closes the connection with 4507."""


class OutboxOwner(Protocol):
    """Receiver of an outbox's callbacks. They run on the event loop and must not block."""

    connection_id: str
    context: contextvars.Context | None

    def on_delivered(self) -> None:
        """Handle a message accepted by the server or its transport. Called only if `reports_delivery` is set."""

    def on_nonzero(self) -> None:
        """Handle memory that is held now, where possibly none was before."""

    def on_unsent(self, count: int) -> None:
        """Handle messages that were passed to the server but not accepted."""

    def on_dropped(self, count: int) -> None:
        """Handle messages that were dropped because the client is a slow consumer."""

    def on_coalesced(self) -> None:
        """Handle a waiting message that was replaced by a newer one of the same key."""

    def on_slow(self, state: SlowConsumer) -> None:
        """Handle a slow consumer. `DISCONNECTED` requires closing the connection."""

    def on_caught_up(self) -> None:
        """Handle a client that is no longer a slow consumer."""

    def send_progress(self) -> int | None:
        """Return a number that grows when the client accepts bytes; `None` where this cannot be measured."""

    def on_send_stalled(self) -> None:
        """Handle a send that has made no progress for `send_timeout`."""

    def on_send_delayed(self) -> None:
        """Handle a send that has made no progress for a while, but for less than `send_timeout`."""

    def on_send_failed(self, error: BaseException) -> None:
        """Handle a message that the server rejected, which means that the connection is lost."""
