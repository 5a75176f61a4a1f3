"""The platforms that are known.

Vendors change their limits. Who changes a value changes its fact too, and the tables of `docs/deploy/platforms.md`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from fastapi_ws_stabilizer.platforms.clouds import AMAZON, AZURE, GOOGLE
from fastapi_ws_stabilizer.platforms.paas import HOSTS
from fastapi_ws_stabilizer.platforms.platform import Platform
from fastapi_ws_stabilizer.platforms.proxies import PROXIES

PLATFORMS: Final[Mapping[str, Platform]] = MappingProxyType(
    {platform.name: platform for platform in (*PROXIES, *AMAZON, *AZURE, *GOOGLE, *HOSTS)}
)
"""By their names."""
