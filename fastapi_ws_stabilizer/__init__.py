"""Production WebSockets for FastAPI.

```python
from fastapi import Depends, FastAPI
from fastapi_ws_stabilizer import StableSocket, WebSocketConnectionManager, stable_socket

manager = WebSocketConnectionManager()
app = FastAPI(lifespan=manager.lifespan)

@app.websocket("/ws/{client_id}")
async def endpoint(ws: StableSocket = Depends(stable_socket)) -> None:
    await ws.run()
```
"""

from __future__ import annotations

from fastapi_ws_stabilizer.close_codes import CloseInfo, DisconnectReason
from fastapi_ws_stabilizer.config import (
    CompressionMode,
    DuplicatePolicy,
    HeartbeatType,
    InboxOverflow,
    MemoryEvictionPolicy,
    OutboxOverflow,
    RejectPolicy,
    WebSocketConfig,
)
from fastapi_ws_stabilizer.connection.outbox import SlowConsumer
from fastapi_ws_stabilizer.dependencies import StableSocketDep, stable_socket
from fastapi_ws_stabilizer.doctor.findings import Finding
from fastapi_ws_stabilizer.errors import (
    BroadcastFailedError,
    ConcurrentReceiveError,
    ConnectionLimitExceededError,
    ConnectionNotFoundError,
    ConnectionTimeoutError,
    DuplicateClientError,
    InvalidTokenError,
    ManagerNotFoundError,
    ManagerNotRunningError,
    MemoryLimitExceededError,
    MessageEncodeError,
    MessageFormatError,
    NotOpenError,
    OriginNotAllowedError,
    RequestError,
    RequestTimeoutError,
    RoomLimitError,
    RoomNameError,
    SessionEndedError,
    ShutdownError,
    SocketClosed,
    ThreadCallTimeoutError,
    TokenExpiredError,
    TooManyConnectionsError,
    UnknownPlatformError,
    UnsupportedByClientError,
    UnsupportedPlatformError,
    WebSocketStabilizerError,
    WrongLoopError,
)
from fastapi_ws_stabilizer.events import Counters, Event
from fastapi_ws_stabilizer.hub.broadcast import BroadcastResult
from fastapi_ws_stabilizer.hub.presence import Presence
from fastapi_ws_stabilizer.manager import WebSocketConnectionManager
from fastapi_ws_stabilizer.observability.logs import JsonFormatter, StructuredLogger, configure_logging, get_logger
from fastapi_ws_stabilizer.room import Room
from fastapi_ws_stabilizer.shutdown.drain import ShutdownReport
from fastapi_ws_stabilizer.socket import StableSocket
from fastapi_ws_stabilizer.stats import stats_router
from fastapi_ws_stabilizer.wire.v1.hello import ResumeOutcome

__version__ = "0.1.0"

__all__ = [
    "BroadcastFailedError",
    "BroadcastResult",
    "CloseInfo",
    "CompressionMode",
    "ConcurrentReceiveError",
    "ConnectionLimitExceededError",
    "ConnectionNotFoundError",
    "ConnectionTimeoutError",
    "Counters",
    "DisconnectReason",
    "DuplicateClientError",
    "DuplicatePolicy",
    "Event",
    "Finding",
    "HeartbeatType",
    "InboxOverflow",
    "InvalidTokenError",
    "JsonFormatter",
    "ManagerNotFoundError",
    "ManagerNotRunningError",
    "MemoryEvictionPolicy",
    "MemoryLimitExceededError",
    "MessageEncodeError",
    "MessageFormatError",
    "NotOpenError",
    "OriginNotAllowedError",
    "OutboxOverflow",
    "Presence",
    "RejectPolicy",
    "RequestError",
    "RequestTimeoutError",
    "ResumeOutcome",
    "Room",
    "RoomLimitError",
    "RoomNameError",
    "SessionEndedError",
    "ShutdownError",
    "ShutdownReport",
    "SlowConsumer",
    "SocketClosed",
    "StableSocket",
    "StableSocketDep",
    "StructuredLogger",
    "ThreadCallTimeoutError",
    "TokenExpiredError",
    "TooManyConnectionsError",
    "UnknownPlatformError",
    "UnsupportedByClientError",
    "UnsupportedPlatformError",
    "WebSocketConfig",
    "WebSocketConnectionManager",
    "WebSocketStabilizerError",
    "WrongLoopError",
    "configure_logging",
    "get_logger",
    "stable_socket",
    "stats_router",
]
