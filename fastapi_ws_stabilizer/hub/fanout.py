"""Sending one message to many: encode once, queue for each, wait for nobody."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from fastapi_ws_stabilizer.errors import BroadcastFailedError
from fastapi_ws_stabilizer.hub.member import Member
from fastapi_ws_stabilizer.wire.payload import Frame

MAX_TURNS: Final = 8
"""Turns of the event loop that a sender gives to writers. Some servers need several for one send."""


@dataclass
class BroadcastResult:
    """What became of a broadcast.

    Attributes:
        total: Connections that it was meant for; excluded ones are not counted.
        succeeded: Connections that it was queued for.
        failed: Connections that it could not be queued for.
        errors: Client id and reason of each failure.
    """

    total: int = 0
    succeeded: int = 0
    failed: int = 0
    errors: list[tuple[str, str]] = field(default_factory=list)


async def fan_out(frame: Frame, members: Iterable[Member]) -> BroadcastResult:
    """Queue one frame for all members.

    No client is waited for. When outboxes of clients that read fill up, the event loop gets a few turns, so that their
    writers can work even if the caller sends in a loop without any pause. Cancelling at that point loses nothing:
    everything is queued.

    Raises:
        BroadcastFailedError: There were members and it could be queued for none.
    """
    result = BroadcastResult()
    pressed: list[Member] = []
    for member in members:
        result.total += 1
        if member.enqueue(frame):
            result.succeeded += 1
            if member.under_pressure():
                pressed.append(member)
        else:
            result.failed += 1
            ending = member.ending
            result.errors.append((member.client_id, ending.reason.value if ending else "not open"))
    if result.total and result.failed == result.total:
        raise BroadcastFailedError(result.total)
    await let_writers_work(pressed)
    return result


async def let_writers_work(pressed: list[Member]) -> None:
    """Give the event loop some turns, `MAX_TURNS` at most, while one of these members is under pressure."""
    for turn in range(MAX_TURNS if pressed else 0):
        await asyncio.sleep(0 if turn < MAX_TURNS // 2 else 0.001)
        if not any(member.under_pressure() for member in pressed):
            break
