"""Python client for services and tests: one session over many connections.

Install it with `pip install "fastapi-ws-stabilizer[client]"`.
"""

from fastapi_ws_stabilizer.client.client import Client, connect
from fastapi_ws_stabilizer.client.errors import (
    BufferFullError,
    ClientClosedError,
    ClientError,
    HttpRejection,
    MessageTooLargeError,
    NotStartedError,
    RefusedError,
    SessionLostError,
    UnreadableFrameError,
)
from fastapi_ws_stabilizer.client.events import Gap
from fastapi_ws_stabilizer.client.transport import Transport, TransportClosedError
from fastapi_ws_stabilizer.errors import RequestError, RequestTimeoutError
from fastapi_ws_stabilizer.wire.v1.frames import Message

__all__ = [
    "BufferFullError",
    "Client",
    "ClientClosedError",
    "ClientError",
    "Gap",
    "HttpRejection",
    "Message",
    "MessageTooLargeError",
    "NotStartedError",
    "RefusedError",
    "RequestError",
    "RequestTimeoutError",
    "SessionLostError",
    "Transport",
    "TransportClosedError",
    "UnreadableFrameError",
    "connect",
]
