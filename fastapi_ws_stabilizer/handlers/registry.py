"""Message handlers: lookup by message type, and validation."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json

from fastapi_ws_stabilizer.connection.inbox import Item
from fastapi_ws_stabilizer.handlers.hooks import Hook
from fastapi_ws_stabilizer.handlers.signatures import Signature, describe
from fastapi_ws_stabilizer.limits.inbound import KeyedRateLimiter
from fastapi_ws_stabilizer.socket import StableSocket
from fastapi_ws_stabilizer.wire.strict_json import InvalidJsonError, check_json, read_json
from fastapi_ws_stabilizer.wire.v1.frames import Message

MAX_PROBLEMS: Final = 5
"""Maximum number of invalid fields in an error reply."""

MAX_PROBLEM_CHARS: Final = 200
"""Maximum length of each problem in an error reply in characters.

Field names, and sometimes values, come from the client and have no length limit.
"""

MAX_TYPE_CHARS: Final = 64
"""Maximum number of characters of an unknown message type in an error reply."""


class InvalidMessageError(Exception):
    """A message that no handler can take.

    Attributes:
        code: The problem as an error code.
        message: The problem as a sentence for the client, without internals of the application.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class ReceivedMessage:
    """One received message, parsed at most once for all handlers.

    Attributes:
        event: The event of a `stabilizer.v1.json` message, or `None`.
        raw: The message as a plain client would have sent it.
    """

    __slots__ = ("_value", "event", "raw")

    def __init__(self, item: Item) -> None:
        if isinstance(item, Message):
            self.event = item.event
            self.raw = item.raw
            self._value: Any = _UNPARSED if isinstance(item.data, bytes) else item.data
        else:
            self.event = None
            self.raw = item
            self._value = _UNPARSED

    @property
    def as_json(self) -> str | bytes:
        """The message as JSON. A text of a client of `stabilizer.v1.json` becomes a JSON string."""
        if isinstance(self._value, str):
            return to_json(self._value)
        return self.raw

    def json(self) -> Any:
        """Return the JSON value of the message.

        Raises:
            InvalidMessageError: The message is not valid JSON.
        """
        if self._value is _UNPARSED:
            try:
                self._value = read_json(self.raw)
            except InvalidJsonError as problem:
                raise InvalidMessageError("bad_json", f"the message cannot be read: {problem}") from None
        return self._value

    def check(self) -> None:
        """Check the message against the limits of `json`, because pydantic's parser has wider ones.

        Raises:
            InvalidMessageError: The message exceeds a limit.
        """
        if self._value is _UNPARSED:
            try:
                check_json(self.raw)
            except InvalidJsonError as problem:
                raise InvalidMessageError("bad_json", f"the message cannot be read: {problem}") from None


_UNPARSED: Final = object()


class MessageHandler:
    """One function for messages: `handler(ws)` or `handler(ws, message)`.

    The annotation of `message` sets its type: `str` or `bytes` as received, or a pydantic model or another type that
    pydantic can validate. Without an annotation, a typed handler gets the JSON value, and a handler for all messages
    gets the message as received.
    """

    __slots__ = ("_adapter", "_hook", "_input_kind", "function", "limit")

    def __init__(self, function: Callable[..., Any], *, typed: bool, limit: KeyedRateLimiter | None = None) -> None:
        signature = Signature(function, "on_message", ("the socket", "the message"))
        self.function = function
        self.limit = limit
        self._hook = Hook(function, signature.arguments)
        self._adapter: TypeAdapter[Any] | None = None
        annotation = signature.message_annotation
        if signature.arguments < 2:
            self._input_kind = "nothing"
        elif annotation in (inspect.Parameter.empty, Any):
            self._input_kind = "json" if typed else "raw"
        elif annotation is str:
            self._input_kind = "text"
        elif annotation is bytes:
            self._input_kind = "bytes"
        elif annotation == str | bytes:
            self._input_kind = "raw"
        else:
            self._input_kind = "what the adapter makes"
            try:
                self._adapter = TypeAdapter(annotation)
            except Exception as error:
                raise signature.cannot_be_read(annotation, error) from error

    def validate(self, received: ReceivedMessage) -> Any:
        """Convert a message to the type that the function takes.

        Raises:
            InvalidMessageError: The message does not fit that type.
        """
        raw = received.raw
        if self._adapter is not None:
            received.check()
            try:
                return self._adapter.validate_json(received.as_json)
            except ValidationError as error:
                value = received.json()  # raises a clearer error if it is not JSON
                raise InvalidMessageError("invalid_message", _problems(error, value)) from None
        if self._input_kind == "json":
            return received.json()
        if self._input_kind == "text" and not isinstance(raw, str):
            raise InvalidMessageError("text_expected", "expected a text message, not a binary one")
        if self._input_kind == "bytes" and not isinstance(raw, bytes):
            raise InvalidMessageError("binary_expected", "expected a binary message, not a text one")
        return raw

    async def __call__(self, socket: StableSocket, message: Any) -> Any:
        """Call the function with the result of `validate`, and return its result."""
        return await self._hook(socket, message)


class HandlerRegistry:
    """Message handlers of one manager: by message type, and for all messages without a typed handler."""

    def __init__(self) -> None:
        self._typed: dict[str, MessageHandler] = {}
        self._others: list[MessageHandler] = []

    def add(
        self, message_type: str | None, function: Callable[..., Any], limit: KeyedRateLimiter | None = None
    ) -> None:
        """Register a function for one message type, or with `None` for all messages without a typed handler.

        Args:
            message_type: The message type.
            function: The function.
            limit: The rate limit of the function for each client.

        Raises:
            TypeError: The function cannot be called with a socket and a message.
            ValueError: The type has a function already.
        """
        handler = MessageHandler(function, typed=message_type is not None, limit=limit)
        if message_type is None:
            self._others.append(handler)
        elif message_type in self._typed:
            first = self._typed[message_type].function
            raise ValueError(
                f"messages of type {message_type!r} already have the handler {describe(first)} and cannot have "
                f"{describe(function)} too: use another type, or call one function from the other"
            )
        else:
            self._typed[message_type] = handler

    def __bool__(self) -> bool:
        return bool(self._typed or self._others)

    def match(self, received: ReceivedMessage) -> list[MessageHandler]:
        """Return the handlers for a message.

        Raises:
            InvalidMessageError: No handler matches. The message is not JSON, has no type, or has an unknown type.
        """
        if not self._typed:
            return self._others
        try:
            message_type = _type_of(received.json()) if received.event is None else received.event
        except InvalidMessageError:
            if self._others:
                return self._others
            raise
        handler = self._typed.get(message_type) if message_type is not None else None
        if handler is not None:
            return [handler]
        if self._others:
            return self._others
        if message_type is None:
            raise InvalidMessageError("no_type", 'expected a JSON object with a string "type"')
        raise InvalidMessageError("unknown_type", f"no handler for messages of type {message_type[:MAX_TYPE_CHARS]!r}")


def _type_of(value: Any) -> str | None:
    message_type = value.get("type") if isinstance(value, dict) else None
    return message_type if isinstance(message_type, str) else None


def _problems(error: ValidationError, value: Any) -> str:
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    problems_shown = [
        _problem(problem["loc"], problem["type"], problem["msg"], value) for problem in problems[:MAX_PROBLEMS]
    ]
    if len(problems) > MAX_PROBLEMS:
        problems_shown.append(f"and {len(problems) - MAX_PROBLEMS} more")
    return "; ".join(problems_shown)


def _problem(location: tuple[int | str, ...], kind: str, text: str, value: Any) -> str:
    if kind in _NAMES_A_CLASS or (kind in _NAMES_A_FUNCTION and "()" in text):
        text = "Input is not valid"
    where = ".".join(_path(location, value, missing=kind == "missing"))
    sentence = f"{where}: {text}" if where else text
    return sentence if len(sentence) <= MAX_PROBLEM_CHARS else f"{sentence[: MAX_PROBLEM_CHARS - 1]}…"


_NAMES_A_CLASS: Final = frozenset({"is_instance_of", "is_subclass_of", "needs_python_object"})
"""Problems with messages in which pydantic names a class of the application or its own."""

_NAMES_A_FUNCTION: Final = frozenset({"union_tag_invalid", "union_tag_not_found"})
"""Problems with messages in which pydantic names the discriminator function of a union, if it is a function."""


def _path(location: tuple[int | str, ...], value: Any, *, missing: bool) -> list[str]:
    """Return the location of a problem in a message: the members and indexes that lead to it.

    pydantic also adds the member of a union that it tried, which names classes and functions of the application. These
    steps are omitted, because they are not part of the message and must not reach the client.
    """
    path: list[str] = []
    for number, step in enumerate(location):
        try:
            value = value[step]
        except (LookupError, TypeError):
            if not (missing and number == len(location) - 1):
                continue
        path.append(str(step))
    return path


def error_reply(problem: InvalidMessageError) -> dict[str, str]:
    """Return the error reply to a plain client for an invalid message."""
    return {"type": "error", "code": problem.code, "message": problem.message}
