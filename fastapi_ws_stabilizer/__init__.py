"""WebSockets for FastAPI that survive production.

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

from fastapi_ws_stabilizer.close_codes import DisconnectReason, Ending
from fastapi_ws_stabilizer.config import (
    CompressionMode,
    DuplicatePolicy,
    HeartbeatType,
    InboxOverflow,
    MemoryEvictionPolicy,
    OutboxOverflow,
    WebSocketConfig,
)
from fastapi_ws_stabilizer.connection.outbox_owner import SlowClient
from fastapi_ws_stabilizer.connection.room import Room
from fastapi_ws_stabilizer.connection.socket import StableSocket
from fastapi_ws_stabilizer.dependencies import StableSocketDep, stable_socket
from fastapi_ws_stabilizer.doctor.findings import Finding
from fastapi_ws_stabilizer.errors import (
    BroadcastFailedError,
    ConcurrentReceiveError,
    ConnectionNotFoundError,
    ConnectionTimeoutError,
    DuplicateClientError,
    InvalidTokenError,
    ManagerNotFoundError,
    MessageEncodeError,
    MessageFormatError,
    NotOpenError,
    PlainClientError,
    RequestError,
    RequestTimeoutError,
    RoomLimitError,
    SessionEndedError,
    ShutdownError,
    SocketClosed,
    TokenExpiredError,
    UnknownPlatformError,
    UnsuitablePlatformError,
    WebSocketStabilizerError,
    WrongLoopError,
)
from fastapi_ws_stabilizer.hub.fanout import BroadcastResult
from fastapi_ws_stabilizer.hub.presence import Presence
from fastapi_ws_stabilizer.logs import JsonFormatter, StructuredLogger, configure_logging, get_logger
from fastapi_ws_stabilizer.manager import WebSocketConnectionManager
from fastapi_ws_stabilizer.reports import Report, Totals
from fastapi_ws_stabilizer.sessions.session import ResumeOutcome
from fastapi_ws_stabilizer.shutdown.closing import ShutdownReport
from fastapi_ws_stabilizer.stats import stats_router

__version__ = "0.1.0"

__all__ = [
    "BroadcastFailedError",
    "BroadcastResult",
    "CompressionMode",
    "ConcurrentReceiveError",
    "ConnectionNotFoundError",
    "ConnectionTimeoutError",
    "DisconnectReason",
    "DuplicateClientError",
    "DuplicatePolicy",
    "Ending",
    "Finding",
    "HeartbeatType",
    "InboxOverflow",
    "InvalidTokenError",
    "JsonFormatter",
    "ManagerNotFoundError",
    "MemoryEvictionPolicy",
    "MessageEncodeError",
    "MessageFormatError",
    "NotOpenError",
    "OutboxOverflow",
    "PlainClientError",
    "Presence",
    "Report",
    "RequestError",
    "RequestTimeoutError",
    "ResumeOutcome",
    "Room",
    "RoomLimitError",
    "SessionEndedError",
    "ShutdownError",
    "ShutdownReport",
    "SlowClient",
    "SocketClosed",
    "StableSocket",
    "StableSocketDep",
    "StructuredLogger",
    "TokenExpiredError",
    "Totals",
    "UnknownPlatformError",
    "UnsuitablePlatformError",
    "WebSocketConfig",
    "WebSocketConnectionManager",
    "WebSocketStabilizerError",
    "WrongLoopError",
    "configure_logging",
    "get_logger",
    "stable_socket",
    "stats_router",
]
