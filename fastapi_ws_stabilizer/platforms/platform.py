"""A platform and its documented limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

About = Literal["idle_timeout", "max_lifetime", "grace", "unsupported_reason", "note"]


@dataclass(frozen=True)
class Fact:
    """Documented fact about a platform.

    Attributes:
        about: The value of the platform that the fact supports, or `"note"`.
        statement: The fact.
        source: The documentation, as an `https://` address.
        checked: The date on which it was read, as `YYYY-MM-DD`.
        second_hand: Whether it was read in a quotation instead of in the source.
    """

    about: About
    statement: str
    source: str
    checked: str
    second_hand: bool = False


def verified(about: About, statement: str, source: str, checked: str = "2026-11-25") -> Fact:
    """Return a fact that was read in its source."""
    return Fact(about, statement, source, checked)


def second_hand(about: About, statement: str, source: str, checked: str = "2026-09-25") -> Fact:
    """Return a fact that was read in a quotation of its source."""
    return Fact(about, statement, source, checked, second_hand=True)


@dataclass(frozen=True)
class Platform:
    """One hop of a path: a proxy, a load balancer, or the environment of the server.

    The values are the defaults of the platform. `None` means that none is documented: either there is no such limit, or
    the vendor does not state it.

    Attributes:
        name: Name in `WebSocketConfig.for_platform`.
        title: Name that the vendor uses.
        facts: The facts that support the values.
        idle_timeout: Seconds without traffic after which it cuts a connection.
        max_lifetime: Seconds after which it cuts a connection, regardless of traffic.
        grace: Seconds between SIGTERM and the end of the process or of its connections.
        unsupported_reason: Why the platform cannot hold sockets; `None` if it can.
    """

    name: str
    title: str
    facts: tuple[Fact, ...]
    idle_timeout: float | None = None
    max_lifetime: float | None = None
    grace: float | None = None
    unsupported_reason: str | None = None
