"""What waits in the outbox of a connection, read from its internals."""

from __future__ import annotations

from fastapi_ws_stabilizer.connection.outbox import Outbox
from fastapi_ws_stabilizer.wire.encoded import EncodedMessage


def waiting_messages(outbox: Outbox) -> list[EncodedMessage]:
    """Return the messages that wait in an outbox, without its control frames."""
    if outbox._queue is not None:
        return outbox._queue.entries[outbox._queue._head :]
    return [] if outbox._single is None else [outbox._single]
