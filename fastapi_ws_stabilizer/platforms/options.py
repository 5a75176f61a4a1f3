"""Options that fit the hops between client and server, derived from the names of the hops."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Final

from fastapi_ws_stabilizer.errors import UnknownPlatformError, UnsupportedPlatformError
from fastapi_ws_stabilizer.platforms.platform import Platform
from fastapi_ws_stabilizer.platforms.registry import PLATFORMS

_VALUES: Final = ("idle_timeout", "max_lifetime", "grace")

PART_OF_IDLE: Final = 0.4
"""Fraction of an idle timeout between two heartbeats. If one is lost, the next still arrives in time."""

PART_OF_GRACE: Final = 1 / 3
"""Fraction of the grace period over which a drain spreads its closes. The rest is for hooks, endpoints and the
server."""

PART_OF_GRACE_FOR_ALL: Final = 2 / 3
"""Fraction of the grace period for the whole drain, unless that leaves too little for the rest."""

MARGIN_PART: Final = 1 / 6
"""Fraction of the grace period that is reserved before SIGKILL, at most `MAX_MARGIN`."""

MAX_MARGIN: Final = 5.0
"""Maximum reserve in seconds."""

SERVER_LEAST: Final = 1.0
"""Minimum time for the server after a drain, in seconds. uvicorn counts its own timeout in whole seconds."""

UPPER_BOUNDED_OPTIONS: Final = ("heartbeat_interval", "drain_window", "drain_timeout")
"""Options that a platform can only lower: their defaults are the maximum."""

PART_OF_LIFETIME: Final = 0.1
"""Fraction of a lifetime by which the server closes a connection early, at most `MAX_EARLY`."""

MAX_EARLY: Final = 60.0
"""Maximum of that time in seconds. A platform counts from the first byte of the handshake, the manager from the accept.
After that time the manager asks the client to reconnect and flushes its queue."""


def hop(name: str, **values: float | None) -> Platform:
    """Return a platform with changed values: `hop("nginx", idle_timeout=300)`.

    Args:
        name: Name of the platform.
        values: Its `idle_timeout`, `max_lifetime` and `grace`, in seconds; `None` means no limit.

    Raises:
        UnknownPlatformError: The platform is unknown.
        UnsupportedPlatformError: The platform cannot hold sockets.
        ValueError: A platform has no such value, or it is not above zero.
    """
    for value, seconds in values.items():
        if value not in _VALUES:
            raise ValueError(f"a platform has no {value}, only {', '.join(_VALUES)}")
        if seconds is not None and not seconds > 0:
            raise ValueError(f"{value} must be a number of seconds above zero, not {seconds!r}")
    (platform,) = resolve_hops(name)
    return dataclasses.replace(platform, **values)  # type: ignore[arg-type]  # checked above


def resolve_hops(*names: str | Platform) -> tuple[Platform, ...]:
    """Return the hops of a path, in their order.

    Args:
        names: Names of platforms (in any case, with `-` or `_`), or results of `hop`.

    Raises:
        UnknownPlatformError: A platform is unknown.
        UnsupportedPlatformError: A platform cannot hold sockets.
        ValueError: There are no names.
    """
    if not names:
        raise ValueError(f"a path needs at least one hop; known platforms: {', '.join(sorted(PLATFORMS))}")
    path: list[Platform] = []
    for name in names:
        if isinstance(name, Platform):
            path.append(name)
            continue
        platform = PLATFORMS.get(name.lower().replace("_", "-"))
        if platform is None:
            similar = difflib.get_close_matches(name.lower().replace("_", "-"), PLATFORMS, n=1)
            raise UnknownPlatformError(name, tuple(sorted(PLATFORMS)), similar[0] if similar else None)
        if platform.unsupported_reason is not None:
            raise UnsupportedPlatformError(platform.name, platform.unsupported_reason)
        path.append(platform)
    return tuple(path)


def derive_options(path: Iterable[Platform], upper_bounds: Mapping[str, float]) -> dict[str, float]:
    """Return the options that fit the smallest values of a path.

    Options for which no hop has a value are omitted.

    Args:
        path: The hops; their order does not matter.
        upper_bounds: Maximum values of the options `UPPER_BOUNDED_OPTIONS`.
    """
    hops = tuple(path)
    idle_timeout = _smallest(hop.idle_timeout for hop in hops)
    max_lifetime = _smallest(hop.max_lifetime for hop in hops)
    grace = _smallest(hop.grace for hop in hops)
    options: dict[str, float] = {}
    if idle_timeout is not None:
        options["heartbeat_interval"] = min(upper_bounds["heartbeat_interval"], idle_timeout * PART_OF_IDLE)
    if max_lifetime is not None:
        options["max_lifetime"] = max_lifetime - min(MAX_EARLY, max_lifetime * PART_OF_LIFETIME)
    if grace is not None:
        options["drain_window"] = min(upper_bounds["drain_window"], round(grace * PART_OF_GRACE, 1))
        left = math.floor((grace - margin(grace) - SERVER_LEAST) * 10) / 10
        drain_timeout = min(round(grace * PART_OF_GRACE_FOR_ALL, 1), left)
        options["drain_timeout"] = min(upper_bounds["drain_timeout"], max(0.1, drain_timeout))
    return options


def margin(grace: float) -> float:
    """Return the seconds of a grace period that a shutdown reserves before SIGKILL."""
    return min(MAX_MARGIN, grace * MARGIN_PART)


def _smallest(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)
