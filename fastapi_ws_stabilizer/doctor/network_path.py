"""`NetworkPath`: what of the platforms between clients and server binds a connection."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from fastapi_ws_stabilizer.errors import UnsupportedPlatformError
from fastapi_ws_stabilizer.platforms.options import resolve_hops
from fastapi_ws_stabilizer.platforms.platform import Platform

GIVEN: Final = "told"
"""The name of the hop that stands for limits which were told, and not taken from a platform's defaults."""

Value = Literal["idle_timeout", "max_lifetime", "grace"]


@dataclass(frozen=True)
class HopLimit:
    """A number of seconds that a hop sets.

    Attributes:
        seconds: How many.
        hop: Its name.
    """

    seconds: float
    hop: str

    def __str__(self) -> str:
        return f"{self.seconds:g} s, as told" if self.hop == GIVEN else f"{self.seconds:g} s of {self.hop}"


@dataclass(frozen=True)
class NetworkPath:
    """The hops between clients and server.

    Attributes:
        hops: They, with the limits that they have here.
        unable: Platforms that cannot hold sockets, each with the reason.
    """

    hops: tuple[Platform, ...] = ()
    unsupported: tuple[tuple[str, str], ...] = ()

    def has(self, name: str) -> bool:
        """Whether a hop of that name is on it."""
        return any(hop.name == name for hop in self.hops)

    def with_hop(self, hop: Platform) -> NetworkPath:
        """The way with one hop more."""
        return NetworkPath((*self.hops, hop), self.unsupported)

    def smallest(self, value: Value) -> HopLimit | None:
        """The smallest of the hops' limits of one kind; `None` if no hop has any."""
        limits = [(seconds, hop.name) for hop in self.hops if (seconds := getattr(hop, value)) is not None]
        return HopLimit(*min(limits)) if limits else None


def path_through(
    names: Iterable[str],
    *,
    idle_timeout: float | None = None,
    max_lifetime: float | None = None,
    grace: float | None = None,
) -> NetworkPath:
    """The way through platforms, with their defaults where nothing else is told.

    Args:
        names: Of the platforms.
        idle_timeout: The shortest idle timeout on the way, in seconds, if not that of the platforms' defaults.
        max_lifetime: The shortest lifetime, likewise.
        grace: The shortest grace, likewise.

    Raises:
        UnknownPlatformError: There is no fact about one of them. It is a `ValueError`.
        ValueError: A number of seconds is not above zero, or has no end.
    """
    hops: list[Platform] = []
    unable = []
    for name in names:
        try:
            hops.extend(resolve_hops(name))
        except UnsupportedPlatformError as error:
            unable.append((error.name, error.refusal))
    given = {"idle_timeout": idle_timeout, "max_lifetime": max_lifetime, "grace": grace}
    changed = {value: seconds for value, seconds in given.items() if seconds is not None}
    if wrong := [value for value, seconds in changed.items() if not 0 < seconds < math.inf]:  # nan is not, either
        raise ValueError(f"{wrong[0]} must be a number of seconds above zero, not {changed[wrong[0]]:g}")
    if changed:
        without: dict[str, None] = dict.fromkeys(changed)
        hops = [dataclasses.replace(hop, **without) for hop in hops]  # type: ignore[arg-type]  # names of floats alone
        hops.append(dataclasses.replace(Platform(GIVEN, "as told", ()), **changed))  # type: ignore[arg-type]
    return NetworkPath(tuple(hops), tuple(unable))
