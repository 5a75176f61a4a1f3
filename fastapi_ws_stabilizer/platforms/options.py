"""From the names of the hops between client and server to the options that fit all of them."""

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
"""The part of an idle timeout that may pass between two beats: then one may be lost, and the next is still in time."""

PART_OF_GRACE: Final = 1 / 3
"""The part of a grace that the closes of a drain may take. The rest is for hooks, for endpoints, and for the server."""

PART_OF_GRACE_FOR_ALL: Final = 2 / 3
"""The part of a grace that all of a drain may take, unless that leaves too little for what follows."""

MARGIN_PART: Final = 1 / 6
"""The part of a grace that is kept free before SIGKILL, ..."""

MAX_MARGIN: Final = 5.0
"""... and the most seconds of that."""

SERVER_LEAST: Final = 1.0
"""The least seconds that the server has after a drain: uvicorn counts its own timeout in whole seconds."""

UPPER_BOUNDED_OPTIONS: Final = ("heartbeat_interval", "drain_window", "drain_timeout")
"""Options whose defaults are the most that a platform sets."""

PART_OF_LIFETIME: Final = 0.1
"""The part of a lifetime by which a connection is closed before its platform would cut it, and ..."""

MAX_EARLY: Final = 60.0
"""... the most seconds of that. A platform counts from the first byte of the handshake, and the manager from the accept
on; then the client is asked to leave, and what is queued for it goes out."""


def hop(name: str, **values: float | None) -> Platform:
    """A platform whose values somebody has changed: `hop("nginx", idle_timeout=300)`.

    Args:
        name: Its name.
        values: Its `idle_timeout`, `max_lifetime` and `grace`, in seconds; `None` where there is no limit any more.

    Raises:
        UnknownPlatformError: There is no fact about it.
        UnsupportedPlatformError: It cannot hold sockets.
        ValueError: A value is none that a platform has, or is not above zero.
    """
    for value, seconds in values.items():
        if value not in _VALUES:
            raise ValueError(f"a platform has no {value}, only {', '.join(_VALUES)}")
        if seconds is not None and not seconds > 0:
            raise ValueError(f"{value} is a number of seconds above zero, not {seconds!r}")
    (platform,) = resolve_hops(name)
    return dataclasses.replace(platform, **values)  # type: ignore[arg-type]  # looked at above


def resolve_hops(*names: str | Platform) -> tuple[Platform, ...]:
    """The hops of a path, in their order.

    Args:
        names: Names of platforms, in any case, with `-` or `_`, or what `hop` has made of one.

    Raises:
        UnknownPlatformError: There is no fact about one of them.
        UnsupportedPlatformError: One of them cannot hold sockets.
        ValueError: There is no name.
    """
    if not names:
        raise ValueError(f"a path has at least one hop; known are {', '.join(sorted(PLATFORMS))}")
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


def derive_options(path: Iterable[Platform], most: Mapping[str, float]) -> dict[str, float]:
    """The options that fit the smallest values of a path; those alone for which a hop has a value.

    Args:
        path: The hops; their order does not matter.
        most: The most that the options `UPPER_BOUNDED_OPTIONS` are set to.
    """
    hops = tuple(path)
    idle_timeout = _smallest(hop.idle_timeout for hop in hops)
    max_lifetime = _smallest(hop.max_lifetime for hop in hops)
    grace = _smallest(hop.grace for hop in hops)
    options: dict[str, float] = {}
    if idle_timeout is not None:
        options["heartbeat_interval"] = min(most["heartbeat_interval"], idle_timeout * PART_OF_IDLE)
    if max_lifetime is not None:
        options["max_lifetime"] = max_lifetime - min(MAX_EARLY, max_lifetime * PART_OF_LIFETIME)
    if grace is not None:
        options["drain_window"] = min(most["drain_window"], round(grace * PART_OF_GRACE, 1))
        left = math.floor((grace - margin(grace) - SERVER_LEAST) * 10) / 10
        drain_timeout = min(round(grace * PART_OF_GRACE_FOR_ALL, 1), left)
        options["drain_timeout"] = min(most["drain_timeout"], max(0.1, drain_timeout))
    return options


def margin(grace: float) -> float:
    """Seconds of a grace that a shutdown leaves free before SIGKILL."""
    return min(MAX_MARGIN, grace * MARGIN_PART)


def _smallest(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)
