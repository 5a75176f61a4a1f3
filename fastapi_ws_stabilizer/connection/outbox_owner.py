"""What an outbox tells of itself, and to whom."""

from __future__ import annotations

import contextvars
from enum import Enum
from typing import Protocol


class SlowConsumer(str, Enum):
    """How slow a client has become. Each is told once until the client has caught up."""

    LAGGING = "lagging"
    """More than half of its outbox is used, and the network takes nothing."""
    DROPPING = "dropping"
    """Messages to it are thrown away, as `outbox_overflow` says."""
    DISCONNECTED = "disconnected"
    """Its outbox was full, and it is disconnected with 4507."""


class OutboxOwner(Protocol):
    """Who is told what happens to the messages. Calls come from the event loop and must not wait."""

    connection_id: str
    context: contextvars.Context | None

    def on_delivered(self) -> None:
        """The server, or its transport, has taken a message. Told only where somebody wants to know."""

    def on_nonzero(self) -> None:
        """What waits is counted, where nothing may have been before."""

    def on_unsent(self, count: int) -> None:
        """Messages were given to the server and not taken."""

    def on_dropped(self, count: int) -> None:
        """Messages were thrown away because the client is slow."""

    def on_coalesced(self) -> None:
        """A newer message has taken the place of one that waited."""

    def on_slow(self, state: SlowConsumer) -> None:
        """The client has become slow; with `DISCONNECTED` it is to be disconnected."""

    def on_caught_up(self) -> None:
        """The client is slow no longer."""

    def send_progress(self) -> int | None:
        """A number that has grown if the client has taken bytes since; `None` where that cannot be seen."""

    def on_send_stalled(self) -> None:
        """A send has made no progress for `send_timeout`."""

    def on_send_delayed(self) -> None:
        """A send has made no progress for a while, and `send_timeout` is not over."""

    def on_send_failed(self, error: BaseException) -> None:
        """The server refused a message: the connection is gone."""
