"""Versions of the installed libraries on which behaviour depends."""

from __future__ import annotations

from typing import Final

import uvicorn
import websockets


def version(text: str) -> tuple[int, ...]:
    """Return the first two numbers of a version."""
    return tuple(int(part) for part in text.split(".")[:2])


UVICORN: Final = version(uvicorn.__version__)
WEBSOCKETS: Final = version(websockets.__version__)

HAS_PROTOCOL_CLASS: Final = UVICORN >= (0, 35)
"""Whether `StableWebSocketProtocol` can be imported: its base class exists."""

HAS_DIRECT_TRANSPORT: Final = UVICORN >= (0, 53) and WEBSOCKETS >= (16, 0)
"""Whether both libraries have everything that the protocol class uses beyond its base class."""
