"""Sending one message to many: encode once, queue for each, wait for nobody."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field

from fastapi_ws_stabilizer.errors import BroadcastFailedError
from fastapi_ws_stabilizer.hub.member import Member
from fastapi_ws_stabilizer.wire.payload import Frame


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

    No client is waited for. When outboxes fill up, the event loop gets one turn, so that writers can work even if the
    caller broadcasts in a loop without any pause. Cancelling at that point loses nothing: everything is queued.

    Raises:
        BroadcastFailedError: There were members and it could be queued for none.
    """
    result = BroadcastResult()
    pressure = False
    for member in members:
        result.total += 1
        if member.enqueue(frame):
            result.succeeded += 1
            pressure = pressure or member.under_pressure()
        else:
            result.failed += 1
            ending = member.ending
            result.errors.append((member.client_id, ending.reason.value if ending else "not open"))
    if result.total and result.failed == result.total:
        raise BroadcastFailedError(result.total)
    if pressure:
        await asyncio.sleep(0)
    return result
