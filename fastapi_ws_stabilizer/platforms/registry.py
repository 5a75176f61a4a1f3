"""Table of the known platforms.

Vendors change their limits. A change of a value here also changes its fact and the tables of
`docs/deploy/platforms.md`.
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
"""Platforms by name."""
