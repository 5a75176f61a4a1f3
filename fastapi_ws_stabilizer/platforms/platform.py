"""A platform, and what its vendor says about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

About = Literal["idle_timeout", "max_lifetime", "grace", "unsupported_reason", "note"]


@dataclass(frozen=True)
class Fact:
    """One thing that is documented about a platform.

    Attributes:
        about: The value of the platform that it is the ground of, or `"note"`.
        says: The fact.
        source: Where it stands, an `https://` address.
        checked: When it was read there, as `YYYY-MM-DD`.
        quoted: Whether it was read in a quotation of that source, and not there.
    """

    about: About
    statement: str
    source: str
    checked: str
    second_hand: bool = False


def verified(about: About, says: str, source: str, checked: str = "2026-11-25") -> Fact:
    """A fact that was read in its source."""
    return Fact(about, says, source, checked)


def second_hand(about: About, says: str, source: str, checked: str = "2026-09-25") -> Fact:
    """A fact that was read in a quotation of its source."""
    return Fact(about, says, source, checked, second_hand=True)


@dataclass(frozen=True)
class Platform:
    """One hop of a path: a proxy, a load balancer, or the place where the server runs.

    The values are those that hold unless somebody has changed them. `None` means that none is documented: there may be
    no such limit, or nobody says.

    Attributes:
        name: By what `WebSocketConfig.for_platform` knows it.
        title: What its vendor calls it.
        idle_timeout: Seconds without traffic after which it cuts a connection.
        max_lifetime: Seconds after which it cuts a connection whatever passes.
        grace: Seconds between SIGTERM and the end of the process or of its connections.
        unsupported_reason: Why no socket can be held there; `None` where one can.
        facts: The grounds.
    """

    name: str
    title: str
    facts: tuple[Fact, ...]
    idle_timeout: float | None = None
    max_lifetime: float | None = None
    grace: float | None = None
    unsupported_reason: str | None = None
