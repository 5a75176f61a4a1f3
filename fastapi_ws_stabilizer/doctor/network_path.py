"""`NetworkPath`: the hops between clients and server, and the limits that they set."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from fastapi_ws_stabilizer.errors import UnsupportedPlatformError
from fastapi_ws_stabilizer.platforms.options import resolve_hops
from fastapi_ws_stabilizer.platforms.platform import Platform

GIVEN: Final = "given"
"""Name of the hop for limits that the caller has given, instead of the defaults of a platform."""

Value = Literal["idle_timeout", "max_lifetime", "grace"]


@dataclass(frozen=True)
class HopLimit:
    """Limit in seconds that a hop sets.

    Attributes:
        seconds: The limit.
        hop: Name of the hop.
    """

    seconds: float
    hop: str

    def __str__(self) -> str:
        return f"{self.seconds:g} s, as given" if self.hop == GIVEN else f"{self.seconds:g} s of {self.hop}"


@dataclass(frozen=True)
class NetworkPath:
    """Hops between clients and server.

    Attributes:
        hops: The hops, with their limits in this deployment.
        unsupported: Platforms that cannot hold sockets, each with the reason.
    """

    hops: tuple[Platform, ...] = ()
    unsupported: tuple[tuple[str, str], ...] = ()

    def has(self, name: str) -> bool:
        """Return whether a hop with that name is on the path."""
        return any(hop.name == name for hop in self.hops)

    def with_hop(self, hop: Platform) -> NetworkPath:
        """Return the path with one more hop."""
        return NetworkPath((*self.hops, hop), self.unsupported)

    def smallest(self, value: Value) -> HopLimit | None:
        """Return the smallest limit of one kind; `None` if no hop has one."""
        limits = [(seconds, hop.name) for hop in self.hops if (seconds := getattr(hop, value)) is not None]
        return HopLimit(*min(limits)) if limits else None


def path_through(
    names: Iterable[str],
    *,
    idle_timeout: float | None = None,
    max_lifetime: float | None = None,
    grace: float | None = None,
) -> NetworkPath:
    """Return the path through platforms, with their defaults unless other values are given.

    Args:
        names: Names of the platforms.
        idle_timeout: Shortest idle timeout on the path, in seconds; by default the platforms' own.
        max_lifetime: Shortest lifetime on the path, likewise.
        grace: Shortest grace period on the path, likewise.

    Raises:
        UnknownPlatformError: A platform is unknown. The error is a `ValueError`.
        ValueError: A number of seconds is not above zero, or is infinite.
    """
    hops: list[Platform] = []
    unsupported = []
    for name in names:
        try:
            hops.extend(resolve_hops(name))
        except UnsupportedPlatformError as error:
            unsupported.append((error.name, error.unsupported_reason))
    given = {"idle_timeout": idle_timeout, "max_lifetime": max_lifetime, "grace": grace}
    changed = {value: seconds for value, seconds in given.items() if seconds is not None}
    if wrong := [value for value, seconds in changed.items() if not 0 < seconds < math.inf]:  # also rejects nan
        raise ValueError(f"{wrong[0]} must be a number of seconds above zero, not {changed[wrong[0]]:g}")
    if changed:
        without: dict[str, None] = dict.fromkeys(changed)
        hops = [dataclasses.replace(hop, **without) for hop in hops]  # type: ignore[arg-type]  # float fields only
        hops.append(dataclasses.replace(Platform(GIVEN, "as given", ()), **changed))  # type: ignore[arg-type]
    return NetworkPath(tuple(hops), tuple(unsupported))
