"""Idempotency keys: a message that a client sends again is handled only once."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Final

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.errors import MessageEncodeError
from fastapi_ws_stabilizer.sessions.session import Session
from fastapi_ws_stabilizer.wire.encoded import encode_json
from fastapi_ws_stabilizer.wire.v1.frames import Message

MAX_KEYS: Final = 10_000
"""Keys of all clients that are remembered. The least recently active client is forgotten first."""

MAX_KEYS_PER_CLIENT: Final = 256
"""Keys per client that are remembered. The oldest is forgotten first."""

MAX_WAITING: Final = 16
"""Requests with one key that may wait for its answer."""

MAX_AGE: Final = 600.0
"""Seconds that a key is remembered."""

MAX_ANSWER_BYTES: Final = 4 * 1024
"""Bytes of the largest answer that is stored. A later request gets the error `handled_before` instead of a larger
one."""


class IdempotencyRecord:
    """State of one idempotency key.

    Attributes:
        at: Time at which its message arrived.
    """

    __slots__ = ("_answer", "_done", "_waiting", "at")

    def __init__(self) -> None:
        self.at = monotonic()
        self._done = False
        self._answer: Any = None
        self._waiting: list[tuple[Session, str]] | None = None

    def answer(self, session: Session, message: Message) -> None:
        """Answer a request with the same key: now, or when the first one is handled.

        A message without a request id gets no answer.
        """
        if message.id is None:
            return
        if self._done:
            self._reply(session, message.id)
            return
        if self._waiting is None:
            self._waiting = []
        if len(self._waiting) >= MAX_WAITING:
            session.reply(message.id, error=_IN_PROGRESS)
            return
        self._waiting.append((session, message.id))

    def complete(self, answer: Any) -> None:
        """Store the answer of the handled message and send it to waiting requests."""
        self._done = True
        try:
            small = encode_json(answer).size <= MAX_ANSWER_BYTES
        except MessageEncodeError:
            small = False
        self._answer = answer if small else _NO_ANSWER
        for session, request_id in self._waiting_requests():
            self._reply(session, request_id)

    def interrupt(self) -> None:
        """Mark the message as at least partly handled, but without an answer."""
        self._done = True
        self._answer = _NO_ANSWER
        for session, request_id in self._waiting_requests():
            self._reply(session, request_id)

    def expire(self) -> None:
        """Reject waiting requests, because the key is forgotten while its message may still be handled."""
        for session, request_id in self._waiting_requests():
            session.reply(request_id, error=_IN_PROGRESS)

    def fail(self) -> None:
        """Reject waiting requests, because the message was not handled."""
        for session, request_id in self._waiting_requests():
            session.reply(
                request_id, error={"code": "not_handled", "message": "the first message with this key failed"}
            )

    def _waiting_requests(self) -> list[tuple[Session, str]]:
        waiting, self._waiting = self._waiting or [], None
        return waiting

    def _reply(self, session: Session, request_id: str) -> None:
        if self._answer is _NO_ANSWER:
            error = {
                "code": "handled_before",
                "message": "this message was already handled, and its answer is not stored",
            }
            session.reply(request_id, error=error)
        else:
            session.reply(request_id, self._answer)


_NO_ANSWER: Final = object()
_IN_PROGRESS: Final = {"code": "in_progress", "message": "a message with this key is being handled"}


class IdempotencyCache:
    """Idempotency keys of all clients.

    Each client has its own keys. A client over its limit loses its own oldest key first.
    """

    def __init__(self) -> None:
        self._clients: OrderedDict[str, OrderedDict[str, IdempotencyRecord]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def look(self, client_id: str, key: str) -> IdempotencyRecord | None:
        """Return the record of a key; `None` if the key is new."""
        record = self._keys_of(client_id).get(key)
        if record is not None and record.at < monotonic() - MAX_AGE:
            self._forget(client_id, key)
            return None
        return record

    def begin(self, client_id: str, key: str) -> None:
        """Add a record for a new key, before its message is handled."""
        keys = self._clients.get(client_id)
        if keys is None:
            keys = self._clients[client_id] = OrderedDict()
        self._clients.move_to_end(client_id)
        keys[key] = IdempotencyRecord()
        self._count += 1
        if len(keys) > MAX_KEYS_PER_CLIENT:
            first = next(iter(keys))
            record = keys[first]
            self._forget(client_id, first)
            record.expire()
        self._forget_old()

    def complete(self, session: Session, key: str, answer: Any) -> None:
        """Store the answer of a key's handled message."""
        record = self._keys_of(session.client_id).get(key)
        if record is not None:
            record.complete(answer)

    def interrupt(self, client_id: str, key: str) -> None:
        """Mark a key's message as at least partly handled, but without an answer."""
        record = self._keys_of(client_id).get(key)
        if record is not None:
            record.interrupt()

    def fail(self, client_id: str, key: str) -> None:
        """Forget a key, because its message was not handled. The next message with the key is handled."""
        record = self._keys_of(client_id).get(key)
        if record is not None:
            self._forget(client_id, key)
            record.fail()

    def _keys_of(self, client_id: str) -> OrderedDict[str, IdempotencyRecord]:
        return self._clients.get(client_id) or OrderedDict()

    def _forget(self, client_id: str, key: str) -> None:
        keys = self._clients[client_id]
        del keys[key]
        self._count -= 1
        if not keys:
            del self._clients[client_id]

    def _forget_old(self) -> None:
        """Forget clients without recent keys, and the least recently active ones above the limit."""
        oldest = monotonic() - MAX_AGE
        while self._clients:
            keys = next(iter(self._clients.values()))
            if self._count <= MAX_KEYS and next(reversed(keys.values())).at >= oldest:
                break
            self._count -= len(keys)
            self._clients.popitem(last=False)
