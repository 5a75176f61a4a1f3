"""Tests of message handlers: the messages that they get, and the types."""

from __future__ import annotations

import functools
from typing import Annotated, Any, Literal, Union

import pytest
from pydantic import AfterValidator, BaseModel, BeforeValidator, Discriminator, Field, InstanceOf, Tag

from fastapi_ws_stabilizer.handlers import registry as messages_module
from fastapi_ws_stabilizer.handlers.registry import (
    MAX_PROBLEM_CHARS,
    MAX_PROBLEMS,
    HandlerRegistry,
    InvalidMessageError,
    MessageHandler,
    ReceivedMessage,
    error_reply,
)


class Chat(BaseModel):
    """Message of an application."""

    type: str = "chat"
    text: str = Field(max_length=5)


class Many(BaseModel):
    """Message with many fields."""

    a: int
    b: int
    c: int
    d: int
    e: int
    f: int
    g: int


class Move(BaseModel):
    """Message of a union."""

    kind: Literal["move"]
    x: int


class Say(BaseModel):
    """Other message of that union."""

    kind: Literal["say"]
    text: str


class Loose(BaseModel):
    """Message with a field of any type."""

    type: str
    x: Any = None


class Strict(BaseModel, extra="forbid"):
    """Message without unknown fields."""


class Inside:
    """Class of the application."""


IsInside = Annotated[InstanceOf[Inside], BeforeValidator(lambda value: value)]


class Room:
    """Object with handlers."""

    def __call__(self, ws: Any, message: Chat) -> None:
        """Take a message."""

    def method(self, ws: Any, message: Chat) -> None:
        """Take a message."""


def prepare(function: Any, raw: str | bytes, *, typed: bool = True) -> Any:
    """Return the argument that `function` gets for a message."""
    return MessageHandler(function, typed=typed).validate(ReceivedMessage(raw))


def takes_loose(ws: Any, message: Loose) -> None:
    """Take a model with a field of any type."""


def takes_chat(ws: Any, message: Chat) -> None:
    """Take a model."""


def takes_dict(ws: Any, message: dict[str, Any]) -> None:
    """Take a dict."""


def takes_str(ws: Any, message: str) -> None:
    """Take text."""


def takes_bytes(ws: Any, message: bytes) -> None:
    """Take bytes."""


def takes_either(ws: Any, message: str | bytes) -> None:
    """Take text or bytes."""


def takes_union_syntax(ws: Any, message: Union[str, bytes]) -> None:  # noqa: UP007 (both spellings are tested)
    """Take text or bytes."""


def takes_any(ws: Any, message: Any) -> None:
    """Take any value."""


def takes_unannotated(ws, message):  # type: ignore[no-untyped-def]
    """Take a message without an annotation."""


def takes_union(ws: Any, message: Annotated[Move | Say, Field(discriminator="kind")]) -> None:
    """Take one of several models."""


def takes_with_db(db: Any, ws: Any, message: Chat) -> None:
    """Take a model after a bound argument."""


def takes_all(*args: Any) -> None:
    """Take all arguments."""


def takes_socket(ws: Any) -> None:
    """Take no message."""


TEXT = '{"type":"chat","text":"hi"}'


@pytest.mark.parametrize(
    "function",
    [
        takes_chat,
        Room(),
        Room().method,
        functools.partial(takes_with_db, "db"),
        functools.partial(takes_chat),
    ],
    ids=["function", "object", "method", "partial of two", "partial"],
)
@pytest.mark.parametrize("raw", [TEXT, TEXT.encode()], ids=["text", "bytes"])
@pytest.mark.parametrize("typed", [True, False])
def test_message_is_validated_as_model(function: Any, raw: str | bytes, typed: bool) -> None:
    """A model annotation validates text and bytes, for every kind of callable."""
    assert prepare(function, raw, typed=typed) == Chat(text="hi")


@pytest.mark.parametrize(
    ("function", "typed", "expected"),
    [
        (takes_dict, True, {"type": "chat", "text": "hi"}),
        (takes_str, True, TEXT),
        (takes_either, True, TEXT),
        (takes_union_syntax, True, TEXT),
        (takes_any, True, {"type": "chat", "text": "hi"}),
        (takes_unannotated, True, {"type": "chat", "text": "hi"}),
        (takes_all, True, {"type": "chat", "text": "hi"}),
        (takes_dict, False, {"type": "chat", "text": "hi"}),
        (takes_str, False, TEXT),
        (takes_any, False, TEXT),
        (takes_unannotated, False, TEXT),
        (takes_all, False, TEXT),
    ],
)
def test_annotation_determines_message_type(function: Any, typed: bool, expected: Any) -> None:
    """The annotation selects the value; without one a typed handler gets parsed JSON, a catch-all the raw message."""
    assert prepare(function, TEXT, typed=typed) == expected


def test_bytes_annotation_receives_raw_bytes() -> None:
    """A handler of bytes gets the raw bytes."""
    assert prepare(takes_bytes, b"\x00\xff", typed=False) == b"\x00\xff"
    assert prepare(takes_either, b"\x00\xff", typed=False) == b"\x00\xff"


def test_union_annotation_uses_discriminator() -> None:
    """An annotation can be any type that pydantic validates."""
    assert prepare(takes_union, '{"kind":"move","x":1}', typed=False) == Move(kind="move", x=1)
    assert prepare(takes_union, '{"kind":"say","text":"a"}', typed=False) == Say(kind="say", text="a")


@pytest.mark.parametrize(
    ("function", "raw", "code"),
    [
        (takes_chat, '{"type":"chat"}', "invalid_message"),
        (takes_chat, "[]", "invalid_message"),
        (takes_chat, "{", "bad_json"),
        (takes_chat, "NaN", "bad_json"),
        (takes_any, "{", "bad_json"),
        (takes_any, b"\xff", "bad_json"),
        (takes_any, "[" * 5000, "bad_json"),
        (takes_any, '"\ud800"', "bad_json"),
        (takes_str, b"data", "text_expected"),
        (takes_bytes, "text", "binary_expected"),
    ],
)
def test_invalid_message_has_error_code(function: Any, raw: str | bytes, code: str) -> None:
    """An invalid message has a fixed error code and a sentence for the client."""
    with pytest.raises(InvalidMessageError) as caught:
        prepare(function, raw)
    assert caught.value.code == code
    assert error_reply(caught.value) == {"type": "error", "code": code, "message": caught.value.message}
    assert caught.value.message


def test_validation_error_names_invalid_fields() -> None:
    """The error names the invalid field and its problem, but not the input or the class."""
    with pytest.raises(InvalidMessageError) as caught:
        prepare(takes_chat, '{"type":"chat","text":"much too long secret"}')
    assert caught.value.message == "text: String should have at most 5 characters"
    with pytest.raises(InvalidMessageError) as caught:
        prepare(takes_chat, "[]")
    assert ":" not in caught.value.message


def test_validation_error_lists_at_most_max_problems() -> None:
    """The error lists at most MAX_PROBLEMS fields and counts the rest."""

    def takes_many(ws: Any, message: Many) -> None:
        """Take a model."""

    with pytest.raises(InvalidMessageError, match=r"and 2 more$") as caught:
        prepare(takes_many, "{}")
    assert caught.value.message.count("Field required") == messages_module.MAX_PROBLEMS


def test_handler_with_socket_only_accepts_any_message() -> None:
    """A handler without a message parameter is called for any message."""
    assert MessageHandler(takes_socket, typed=True).validate(ReceivedMessage("anything")) == "anything"


async def test_handler_is_called_with_its_parameters() -> None:
    """A handler gets the socket and the message, or only the socket."""
    calls: list[Any] = []
    await MessageHandler(lambda ws, message: calls.append((ws, message)), typed=True)("socket", "message")  # type: ignore[arg-type]
    await MessageHandler(lambda ws: calls.append(ws), typed=True)("socket", "message")  # type: ignore[arg-type]
    assert calls == [("socket", "message"), "socket"]


def test_handler_with_too_many_parameters_raises() -> None:
    """A function with more than two required parameters raises at registration."""
    with pytest.raises(TypeError, match="cannot be an on_message function"):
        HandlerRegistry().add("chat", lambda ws, message, more: None)


def test_message_is_parsed_once_for_all_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message is parsed once, for any number of handlers."""
    parsed: list[Any] = []
    real = messages_module.read_json

    def counting(*args: Any, **kwargs: Any) -> Any:
        parsed.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(messages_module, "read_json", counting)
    handlers = HandlerRegistry()
    for _ in range(3):
        handlers.add(None, takes_dict)
    handlers.add("move", takes_any)
    received = ReceivedMessage(TEXT)
    for handler in handlers.match(received):
        handler.validate(received)
    assert len(parsed) == 1


# ── contents of errors ──


def inside_validator(text: str) -> str:
    """Reject each value; the name must not reach a client."""
    raise ValueError("not that")


def inside_tag(value: Any) -> str:
    """Return the tag of a value; the name must not reach a client."""
    return str(value.get("kind"))


def takes_plain_union(ws: Any, message: Union[Say, Move]) -> None:  # noqa: UP007
    """Take one of two models."""


def takes_validated(ws: Any, message: Annotated[str, AfterValidator(inside_validator)] | int) -> None:
    """Take a value with a validator function."""


def takes_instance(ws: Any, message: dict[str, IsInside]) -> None:
    """Take an instance that no JSON can be."""


def takes_tagged(
    ws: Any,
    message: Annotated[
        Annotated[Say, Tag("say")] | Annotated[Move, Tag("move")],
        Discriminator(inside_tag),
    ],
) -> None:
    """Take a union with a discriminator function."""


def takes_strict(ws: Any, message: Strict) -> None:
    """Take a model without unknown fields."""


def validation_error(function: Any, raw: str) -> str:
    """Return the error for the client."""
    with pytest.raises(InvalidMessageError) as caught:
        prepare(function, raw, typed=False)
    assert caught.value.code == "invalid_message"
    return caught.value.message


def test_validation_error_does_not_name_union_members() -> None:
    """A location in an error has message fields only, without the classes that pydantic tried."""
    error_text = validation_error(takes_plain_union, '{"kind":"x"}')
    assert error_text == (
        "kind: Input should be 'say'; text: Field required; kind: Input should be 'move'; x: Field required"
    )


@pytest.mark.parametrize(
    ("function", "raw"),
    [(takes_validated, '"x"'), (takes_instance, '{"x":1}'), (takes_tagged, '{"kind":"other"}')],
    ids=["validator", "class", "discriminator"],
)
def test_validation_error_does_not_name_functions_or_classes(function: Any, raw: str) -> None:
    """An error contains no name of the application's code."""
    error_text = validation_error(function, raw).lower()
    assert error_text
    assert not any(word in error_text for word in ("inside", "function", "instance of", "class", "()"))


def test_validation_error_truncates_unknown_member_names() -> None:
    """An unknown field name is truncated, so that a reply is shorter than its message."""
    assert validation_error(takes_strict, '{"unknown":1}') == "unknown: Extra inputs are not permitted"
    many = ",".join(f'"{number}{"x" * 100_000}":1' for number in range(9))
    error_text = validation_error(takes_strict, f"{{{many}}}")
    assert len(error_text) <= MAX_PROBLEMS * (MAX_PROBLEM_CHARS + 2) + len("and 9 more")
    assert error_text.endswith("and 4 more")


def test_unknown_type_is_escaped_and_truncated_in_error() -> None:
    """An unknown type is quoted, escaped and truncated in the error."""
    handlers = HandlerRegistry()
    handlers.add("chat", takes_any)
    with pytest.raises(InvalidMessageError) as caught:
        handlers.match(ReceivedMessage('{"type":"\\r\\n\\u001b[2J' + "x" * 100_000 + '"}'))
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 200


# ── limits of JSON ──


@pytest.mark.parametrize(
    ("function", "typed"),
    [(takes_chat, True), (takes_chat, False), (takes_loose, True), (takes_loose, False), (takes_any, True)],
)
@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("NaN", "not JSON"),
        ("[-Infinity]", "not JSON"),
        ("1e999", "it contains a number beyond"),
        ("9" * 400, "it contains a number beyond"),
        ("9" * 100_000, "not JSON"),
        ("[" * 64 + "]" * 64, "nested deeper than 64 levels"),
        ("[" * 5000, "not JSON"),
        ('"\\ud800"', "not JSON"),
    ],
    ids=["nan", "infinity", "huge", "many digits", "endless digits", "deep", "deepest", "lone surrogate"],
)
def test_json_limits_apply_to_every_handler(function: Any, typed: bool, value: str, what: str) -> None:
    """JSON limits apply before pydantic, to handlers with a type and without."""
    raw = f'{{"type":"chat","text":"hi","x":{value}}}'
    for message in (raw, raw.encode()):
        with pytest.raises(InvalidMessageError, match=what) as caught:
            prepare(function, message, typed=typed)
        assert caught.value.code == "bad_json"


def test_last_of_duplicate_types_selects_handler_and_model() -> None:
    """With duplicate `type` keys, the last one selects both handler and model."""
    handlers = HandlerRegistry()
    handlers.add("a", takes_loose)
    handlers.add("b", takes_loose)
    received = ReceivedMessage('{"type":"a","type":"b"}')
    (handler,) = handlers.match(received)
    assert handler is handlers.match(ReceivedMessage('{"type":"b"}'))[0]
    assert handler.validate(received).type == "b"


# ── matching ──


def found(handlers: HandlerRegistry, raw: str | bytes) -> list[Any]:
    """Return the functions that are called for a message."""
    return [handler.function for handler in handlers.match(ReceivedMessage(raw))]


def test_registry_without_handlers_matches_nothing() -> None:
    """A registry without handlers is false and matches nothing."""
    handlers = HandlerRegistry()
    assert not handlers
    assert found(handlers, "anything") == []


def test_message_type_selects_its_handler() -> None:
    """A message type selects its handler alone."""
    handlers = HandlerRegistry()
    handlers.add("chat", takes_chat)
    handlers.add("move", takes_any)
    assert handlers
    assert found(handlers, TEXT) == [takes_chat]
    assert found(handlers, b'{"type":"move"}') == [takes_any]


@pytest.mark.parametrize("raw", ["plain text", b"\xff", '{"type":"other"}', '{"a":1}', '{"type":7}', "[]"])
def test_unmatched_message_goes_to_catch_all_handler(raw: str | bytes) -> None:
    """A catch-all handler gets each message without a handler of its own, JSON or not."""
    handlers = HandlerRegistry()
    handlers.add("chat", takes_chat)
    handlers.add(None, takes_any)
    assert found(handlers, raw) == [takes_any]
    assert found(handlers, TEXT) == [takes_chat]


def test_catch_all_handler_alone_receives_unparsed_message() -> None:
    """Without typed handlers a message is matched unparsed."""
    handlers = HandlerRegistry()
    handlers.add(None, takes_any)
    assert handlers
    assert found(handlers, "{") == [takes_any]


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        ("{", "bad_json"),
        (b"\xff", "bad_json"),
        ("[]", "no_type"),
        ('{"a":1}', "no_type"),
        ('{"type":7}', "no_type"),
        ('{"type":"other"}', "unknown_type"),
    ],
)
def test_message_without_matching_handler_is_invalid(raw: str | bytes, code: str) -> None:
    """If all handlers have a type, a message without a matching type is a bad message."""
    handlers = HandlerRegistry()
    handlers.add("chat", takes_chat)
    with pytest.raises(InvalidMessageError) as caught:
        handlers.match(ReceivedMessage(raw))
    assert caught.value.code == code


def test_long_unknown_type_is_truncated_in_error() -> None:
    """A long unknown type is truncated, so that a reply is shorter than its message."""
    handlers = HandlerRegistry()
    handlers.add("chat", takes_chat)
    with pytest.raises(InvalidMessageError) as caught:
        handlers.match(ReceivedMessage('{"type":"' + "x" * 10_000 + '"}'))
    assert len(caught.value.message) < 200
