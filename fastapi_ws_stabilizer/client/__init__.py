"""A client for Python: one session with a server of this library, over as many connections as it takes.

`pip install "fastapi-ws-stabilizer[client]"`. It is what services and tests use.
"""

from fastapi_ws_stabilizer.client.client import Client, connect
from fastapi_ws_stabilizer.client.errors import (
    BufferFullError,
    ClientError,
    ClosedError,
    NotStartedError,
    RefusedError,
    SessionLostError,
    TooLargeError,
    UnreadableFrameError,
)
from fastapi_ws_stabilizer.client.owner import Gap
from fastapi_ws_stabilizer.client.transport import Transport, TransportLostError
from fastapi_ws_stabilizer.errors import RequestError, RequestTimeoutError
from fastapi_ws_stabilizer.wire.v1 import Message

__all__ = [
    "BufferFullError",
    "Client",
    "ClientError",
    "ClosedError",
    "Gap",
    "Message",
    "NotStartedError",
    "RefusedError",
    "RequestError",
    "RequestTimeoutError",
    "SessionLostError",
    "TooLargeError",
    "Transport",
    "TransportLostError",
    "UnreadableFrameError",
    "connect",
]
