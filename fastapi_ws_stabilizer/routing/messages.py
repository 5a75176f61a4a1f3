"""Message handlers: which messages they take, and as what."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json, to_json

from fastapi_ws_stabilizer.connection.inbox import Item
from fastapi_ws_stabilizer.connection.socket import StableSocket
from fastapi_ws_stabilizer.routing.hooks import Hook, check_parameters, positional_parameters
from fastapi_ws_stabilizer.wire.v1 import Message

MAX_PROBLEMS: Final = 5
"""How many wrong fields an error reply names."""


class BadMessage(Exception):
    """A message that no handler can take.

    Attributes:
        code: What is wrong, as a fixed word.
        message: What is wrong, for the client; nothing of the inside.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Received:
    """One received message, parsed at most once however many handlers look at it.

    Attributes:
        event: What kind of message its client says it is, where clients can say so.
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
        """The message as JSON: of a client that says what it sends, a text is a JSON string."""
        if isinstance(self._value, str):
            return to_json(self._value)
        return self.raw

    def json(self) -> Any:
        """The JSON value of the message.

        Raises:
            BadMessage: It is not JSON.
        """
        if self._value is _UNPARSED:
            try:
                self._value = from_json(self.raw, allow_inf_nan=False)
            except (ValueError, TypeError) as error:  # TypeError: half of a surrogate pair
                raise BadMessage("bad_json", f"the message is not JSON: {error}") from None
        return self._value


_UNPARSED: Final = object()


class MessageHandler:
    """One function for messages: `handler(ws)` or `handler(ws, message)`.

    The annotation of `message` says as what it is wanted: `str` or `bytes` as it came, a pydantic model or any other
    type that pydantic can validate, or, without an annotation, the JSON value for a typed handler and the message as it
    came for one that takes all.
    """

    __slots__ = ("_adapter", "_hook", "_wants", "function")

    def __init__(self, function: Callable[..., Any], *, typed: bool) -> None:
        arguments = check_parameters(function, "on_message", 2, "the socket, and the message if it wants it")
        self.function = function
        self._hook = Hook(function, arguments)
        self._adapter: TypeAdapter[Any] | None = None
        annotation: Any = _message_annotation(function) if arguments == 2 else inspect.Parameter.empty
        if arguments < 2:
            self._wants = "nothing"
        elif annotation in (inspect.Parameter.empty, Any):
            self._wants = "json" if typed else "raw"
        elif annotation is str:
            self._wants = "text"
        elif annotation is bytes:
            self._wants = "bytes"
        elif annotation == str | bytes:
            self._wants = "raw"
        else:
            self._wants = "what the adapter makes"
            self._adapter = TypeAdapter(annotation)

    def prepare(self, received: Received) -> Any:
        """Turn a message into what the function wants.

        Raises:
            BadMessage: The message is not of that kind.
        """
        raw = received.raw
        if self._adapter is not None:
            try:
                return self._adapter.validate_json(received.as_json)
            except ValidationError as error:
                received.json()  # says better than pydantic when it is not JSON at all
                raise BadMessage("invalid_message", _problems(error)) from None
        if self._wants == "json":
            return received.json()
        if self._wants == "text" and not isinstance(raw, str):
            raise BadMessage("text_expected", "a text message is expected here, not a binary one")
        if self._wants == "bytes" and not isinstance(raw, bytes):
            raise BadMessage("binary_expected", "a binary message is expected here, not a text one")
        return raw

    async def __call__(self, socket: StableSocket, message: Any) -> Any:
        """Call the function with what `prepare` gave, and return what it returned."""
        return await self._hook(socket, message)


class MessageHandlers:
    """The message handlers of one manager: by type, and those that take what no typed one does."""

    def __init__(self) -> None:
        self._typed: dict[str, list[MessageHandler]] = {}
        self._others: list[MessageHandler] = []

    def add(self, message_type: str | None, function: Callable[..., Any]) -> None:
        """Register a function for one type of message, or with `None` for all that have no handler of their own.

        Raises:
            TypeError: It cannot be called with a socket and a message.
        """
        handler = MessageHandler(function, typed=message_type is not None)
        if message_type is None:
            self._others.append(handler)
        else:
            self._typed.setdefault(message_type, []).append(handler)

    def __bool__(self) -> bool:
        return bool(self._typed or self._others)

    def find(self, received: Received) -> list[MessageHandler]:
        """The handlers for a message.

        Raises:
            BadMessage: There is none: it is not JSON, has no type, or one that nobody handles.
        """
        if not self._typed:
            return self._others
        try:
            message_type = _type_of(received.json()) if received.event is None else received.event
        except BadMessage:
            if self._others:
                return self._others
            raise
        handlers = self._typed.get(message_type) if message_type is not None else None
        if handlers is not None:
            return handlers
        if self._others:
            return self._others
        if message_type is None:
            raise BadMessage("no_type", 'a JSON object with a text "type" is expected')
        raise BadMessage("unknown_type", f"no handler for messages of type {message_type[:64]!r}")


def _type_of(value: Any) -> str | None:
    message_type = value.get("type") if isinstance(value, dict) else None
    return message_type if isinstance(message_type, str) else None


def _message_annotation(function: Callable[..., Any]) -> Any:
    parameters = positional_parameters(function)
    if parameters is None:
        return inspect.Parameter.empty
    target: Any = function
    while isinstance(target, functools.partial):
        target = target.func
    if not inspect.isroutine(target):
        target = getattr(target, "__call__", target)  # noqa: B004 (it is the method itself that is looked at)
    hints = typing.get_type_hints(target, include_extras=True)
    return hints.get(parameters[1].name, inspect.Parameter.empty)


def _problems(error: ValidationError) -> str:
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    told = [
        f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" if problem["loc"] else problem["msg"]
        for problem in problems[:MAX_PROBLEMS]
    ]
    if len(problems) > MAX_PROBLEMS:
        told.append(f"and {len(problems) - MAX_PROBLEMS} more")
    return "; ".join(told)


def error_reply(problem: BadMessage) -> dict[str, str]:
    """What a client is told about a message that nobody could take."""
    return {"type": "error", "code": problem.code, "message": problem.message}
