"""The table of all targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from tests.fuzz.targets.configs import config
from tests.fuzz.targets.conversations import conversations
from tests.fuzz.targets.frames import frames
from tests.fuzz.targets.negotiation import negotiation
from tests.fuzz.targets.served import handshake, protocol
from tests.fuzz.targets.tokens import tokens

TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    "frames": frames,
    "conversations": conversations,
    "negotiation": negotiation,
    "tokens": tokens,
    "config": config,
    "handshake": handshake,
    "protocol": protocol,
}
"""Every target by its name."""
