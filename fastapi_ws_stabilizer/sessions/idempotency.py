"""Idempotency keys: a message that a client sends again, because it does not know, is handled once."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Final

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.errors import MessageEncodeError
from fastapi_ws_stabilizer.sessions.session import Session
from fastapi_ws_stabilizer.wire.encoded import encode_json
from fastapi_ws_stabilizer.wire.v1.frames import Message

MAX_KEYS: Final = 10_000
"""Keys of all clients that are remembered at most. The client that has used none for longest is forgotten first."""

MAX_KEYS_OF_ONE: Final = 256
"""Keys of one client that are remembered at most; its oldest is forgotten first."""

MAX_WAITING: Final = 16
"""Requests with one key that wait for its answer at most."""

MAX_AGE: Final = 600.0
"""Seconds that a key is remembered."""

MAX_ANSWER_BYTES: Final = 4 * 1024
"""Answers above this size are not remembered; who asks again is told so."""


class IdempotencyRecord:
    """What is known of one key.

    Attributes:
        at: When its message came.
    """

    __slots__ = ("_answer", "_done", "_waiting", "at")

    def __init__(self) -> None:
        self.at = monotonic()
        self._done = False
        self._answer: Any = None
        self._waiting: list[tuple[Session, str]] | None = None

    def answer(self, session: Session, message: Message) -> None:
        """Answer a message with the same key, if it wants an answer: now, or when the first one is handled."""
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

    def done(self, answer: Any) -> None:
        """The message was handled."""
        self._done = True
        try:
            small = encode_json(answer).size <= MAX_ANSWER_BYTES
        except MessageEncodeError:
            small = False
        self._answer = answer if small else _FORGOTTEN
        for session, request_id in self._waiting_requests():
            self._reply(session, request_id)

    def interrupted(self) -> None:
        """The message was handled, or a part of it, and there is no answer."""
        self._done = True
        self._answer = _FORGOTTEN
        for session, request_id in self._waiting_requests():
            self._reply(session, request_id)

    def forgotten(self) -> None:
        """Nothing is known of it any more, though its message may still be in hand."""
        for session, request_id in self._waiting_requests():
            session.reply(request_id, error=_IN_PROGRESS)

    def failed(self) -> None:
        """The message was not handled after all."""
        for session, request_id in self._waiting_requests():
            session.reply(
                request_id, error={"code": "not_handled", "message": "the first message with this key failed"}
            )

    def _waiting_requests(self) -> list[tuple[Session, str]]:
        waiting, self._waiting = self._waiting or [], None
        return waiting

    def _reply(self, session: Session, request_id: str) -> None:
        if self._answer is _FORGOTTEN:
            error = {"code": "handled_before", "message": "this was handled before, and its answer is not kept"}
            session.reply(request_id, error=error)
        else:
            session.reply(request_id, self._answer)


_FORGOTTEN: Final = object()
_IN_PROGRESS: Final = {"code": "in_progress", "message": "a message with this key is being handled"}


class IdempotencyCache:
    """The keys of all clients. One client's keys say nothing about another's, and push out its own first."""

    def __init__(self) -> None:
        self._clients: OrderedDict[str, OrderedDict[str, IdempotencyRecord]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def look(self, client_id: str, key: str) -> IdempotencyRecord | None:
        """What is known of a key; `None` if it is new."""
        known = self._keys_of(client_id).get(key)
        if known is not None and known.at < monotonic() - MAX_AGE:
            self._forget(client_id, key)
            return None
        return known

    def begin(self, client_id: str, key: str) -> None:
        """A message with a new key is going to be handled."""
        keys = self._clients.get(client_id)
        if keys is None:
            keys = self._clients[client_id] = OrderedDict()
        self._clients.move_to_end(client_id)
        keys[key] = IdempotencyRecord()
        self._count += 1
        if len(keys) > MAX_KEYS_OF_ONE:
            first = next(iter(keys))
            known = keys[first]
            self._forget(client_id, first)
            known.forgotten()
        self._forget_old()

    def handled(self, session: Session, key: str, answer: Any) -> None:
        """Its message was handled, with this answer."""
        known = self._keys_of(session.client_id).get(key)
        if known is not None:
            known.done(answer)

    def interrupted(self, client_id: str, key: str) -> None:
        """Its message was handled, or a part of it, and there is no answer."""
        known = self._keys_of(client_id).get(key)
        if known is not None:
            known.interrupted()

    def failed(self, client_id: str, key: str) -> None:
        """Its message was not handled after all: the next one is."""
        known = self._keys_of(client_id).get(key)
        if known is not None:
            self._forget(client_id, key)
            known.failed()

    def _keys_of(self, client_id: str) -> OrderedDict[str, IdempotencyRecord]:
        return self._clients.get(client_id) or OrderedDict()

    def _forget(self, client_id: str, key: str) -> None:
        keys = self._clients[client_id]
        del keys[key]
        self._count -= 1
        if not keys:
            del self._clients[client_id]

    def _forget_old(self) -> None:
        """Forget clients that have used no key for long, and some more if there are too many."""
        oldest = monotonic() - MAX_AGE
        while self._clients:
            keys = next(iter(self._clients.values()))
            if self._count <= MAX_KEYS and next(reversed(keys.values())).at >= oldest:
                break
            self._count -= len(keys)
            self._clients.popitem(last=False)
