"""What tests read from a client of the websockets library: messages of a type, and the close frame of the server."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed


async def received_close(client: ClientConnection, timeout: float = 5.0, *, discard: bool = True) -> tuple[int, str]:
    """Wait until the server closes, and return the code and reason of its close frame.

    Args:
        client: The client. A connection that ends without a close frame fails the test.
        timeout: Seconds to wait.
        discard: Whether messages may come before the close. Otherwise one fails the test.
    """

    async def read() -> None:
        await client.recv()
        while discard:
            await client.recv()

    with pytest.raises(ConnectionClosed) as closed:
        await asyncio.wait_for(read(), timeout)
    assert closed.value.rcvd is not None, "1006: closed without a close frame"
    return closed.value.rcvd.code, closed.value.rcvd.reason


async def next_of_type(client: ClientConnection, *types: str, timeout: float = 15.0) -> Any:
    """Return the next JSON message of one of these types, and discard all others.

    Args:
        client: The client.
        types: Values of the field `type`.
        timeout: Seconds to wait.
    """

    async def read() -> Any:
        while True:
            message = json.loads(await client.recv())
            if message["type"] in types:
                return message

    return await asyncio.wait_for(read(), timeout)
