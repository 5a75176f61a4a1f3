"""Tests of message handlers: which messages they take, and as what."""

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
    """A message of an application."""

    type: str = "chat"
    text: str = Field(max_length=5)


class Many(BaseModel):
    """A message with many fields."""

    a: int
    b: int
    c: int
    d: int
    e: int
    f: int
    g: int


class Move(BaseModel):
    """A message of a union."""

    kind: Literal["move"]
    x: int


class Say(BaseModel):
    """Another message of that union."""

    kind: Literal["say"]
    text: str


class Loose(BaseModel):
    """A message whose field may be anything."""

    type: str
    x: Any = None


class Strict(BaseModel, extra="forbid"):
    """A message that knows all its fields."""


class Inside:
    """A class of the application."""


IsInside = Annotated[InstanceOf[Inside], BeforeValidator(lambda value: value)]


class Room:
    """An object with handlers."""

    def __call__(self, ws: Any, message: Chat) -> None:
        """Take a message."""

    def method(self, ws: Any, message: Chat) -> None:
        """Take a message."""


def prepare(function: Any, raw: str | bytes, *, typed: bool = True) -> Any:
    """What `function` would be given for a message."""
    return MessageHandler(function, typed=typed).validate(ReceivedMessage(raw))


def takes_loose(ws: Any, message: Loose) -> None:
    """Take a model with a field for anything."""


def takes_chat(ws: Any, message: Chat) -> None:
    """Take a model."""


def takes_dict(ws: Any, message: dict[str, Any]) -> None:
    """Take an object."""


def takes_str(ws: Any, message: str) -> None:
    """Take text."""


def takes_bytes(ws: Any, message: bytes) -> None:
    """Take bytes."""


def takes_either(ws: Any, message: str | bytes) -> None:
    """Take a message as it came."""


def takes_either_in_words(ws: Any, message: Union[str, bytes]) -> None:  # noqa: UP007 (both spellings are tested)
    """Take a message as it came."""


def takes_any(ws: Any, message: Any) -> None:
    """Take anything."""


def takes_something(ws, message):  # type: ignore[no-untyped-def]
    """Take anything, without a word about it."""


def takes_union(ws: Any, message: Annotated[Move | Say, Field(discriminator="kind")]) -> None:
    """Take one of several models."""


def takes_with_db(db: Any, ws: Any, message: Chat) -> None:
    """Take a model, with something bound before."""


def takes_all(*args: Any) -> None:
    """Take whatever there is."""


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
    """A handler that wants a model gets it, however the function is made and whether text or bytes came."""
    assert prepare(function, raw, typed=typed) == Chat(text="hi")


@pytest.mark.parametrize(
    ("function", "typed", "expected"),
    [
        (takes_dict, True, {"type": "chat", "text": "hi"}),
        (takes_str, True, TEXT),
        (takes_either, True, TEXT),
        (takes_either_in_words, True, TEXT),
        (takes_any, True, {"type": "chat", "text": "hi"}),
        (takes_something, True, {"type": "chat", "text": "hi"}),
        (takes_all, True, {"type": "chat", "text": "hi"}),
        (takes_dict, False, {"type": "chat", "text": "hi"}),
        (takes_str, False, TEXT),
        (takes_any, False, TEXT),
        (takes_something, False, TEXT),
        (takes_all, False, TEXT),
    ],
)
def test_annotation_determines_message_type(function: Any, typed: bool, expected: Any) -> None:
    """Without an annotation a typed handler gets the JSON value, and one that takes all the message as it came."""
    assert prepare(function, TEXT, typed=typed) == expected


def test_bytes_annotation_receives_raw_bytes() -> None:
    """A handler of bytes gets them untouched."""
    assert prepare(takes_bytes, b"\x00\xff", typed=False) == b"\x00\xff"
    assert prepare(takes_either, b"\x00\xff", typed=False) == b"\x00\xff"


def test_union_annotation_uses_discriminator() -> None:
    """Anything that pydantic validates can be an annotation."""
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
    """What is wrong with a message is a fixed word and a sentence for the client."""
    with pytest.raises(InvalidMessageError) as caught:
        prepare(function, raw)
    assert caught.value.code == code
    assert error_reply(caught.value) == {"type": "error", "code": code, "message": caught.value.message}
    assert caught.value.message


def test_validation_error_names_invalid_fields() -> None:
    """The reply says which field is wrong and why, and nothing of the input or the inside."""
    with pytest.raises(InvalidMessageError) as caught:
        prepare(takes_chat, '{"type":"chat","text":"much too long secret"}')
    assert caught.value.message == "text: String should have at most 5 characters"
    with pytest.raises(InvalidMessageError) as caught:
        prepare(takes_chat, "[]")
    assert ":" not in caught.value.message


def test_validation_error_lists_at_most_max_problems() -> None:
    """Of many wrong fields a few are named, and the rest is counted."""

    def takes_many(ws: Any, message: Many) -> None:
        """Take many."""

    with pytest.raises(InvalidMessageError, match=r"and 2 more$") as caught:
        prepare(takes_many, "{}")
    assert caught.value.message.count("Field required") == messages_module.MAX_PROBLEMS


def test_handler_with_socket_only_accepts_any_message() -> None:
    """A handler without a message is called for it all the same."""
    assert MessageHandler(takes_socket, typed=True).validate(ReceivedMessage("anything")) == "anything"


async def test_handler_is_called_with_its_parameters() -> None:
    """The function gets socket and message, or the socket only if it takes no more."""
    calls: list[Any] = []
    await MessageHandler(lambda ws, message: calls.append((ws, message)), typed=True)("socket", "message")  # type: ignore[arg-type]
    await MessageHandler(lambda ws: calls.append(ws), typed=True)("socket", "message")  # type: ignore[arg-type]
    assert calls == [("socket", "message"), "socket"]


def test_handler_with_too_many_parameters_raises() -> None:
    """A function that wants more than a socket and a message is an error at once."""
    with pytest.raises(TypeError, match="cannot be an on_message function"):
        HandlerRegistry().add("chat", lambda ws, message, more: None)


def test_message_is_parsed_once_for_all_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many handlers look at a message, its JSON is read once."""
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


# ── what a client is told, and what not ──


def no_insider(text: str) -> str:
    """A validator whose name is nobody's business."""
    raise ValueError("not that")


def inside_tag(value: Any) -> str:
    """A discriminator whose name is nobody's business."""
    return str(value.get("kind"))


def takes_plain_union(ws: Any, message: Union[Say, Move]) -> None:  # noqa: UP007
    """Take one of two models."""


def takes_validated(ws: Any, message: Annotated[str, AfterValidator(no_insider)] | int) -> None:
    """Take what a function looks at."""


def takes_instance(ws: Any, message: dict[str, IsInside]) -> None:
    """Take what no JSON can be."""


def takes_tagged(
    ws: Any,
    message: Annotated[
        Annotated[Say, Tag("say")] | Annotated[Move, Tag("move")],
        Discriminator(inside_tag),
    ],
) -> None:
    """Take what a function tells apart."""


def takes_strict(ws: Any, message: Strict) -> None:
    """Take a model that knows all its fields."""


def validation_error(function: Any, raw: str) -> str:
    """What the client is told."""
    with pytest.raises(InvalidMessageError) as caught:
        prepare(function, raw, typed=False)
    assert caught.value.code == "invalid_message"
    return caught.value.message


def test_validation_error_does_not_name_union_members() -> None:
    """A place is a place in the message: no class that pydantic has tried stands in it."""
    told = validation_error(takes_plain_union, '{"kind":"x"}')
    assert told == (
        "kind: Input should be 'say'; text: Field required; kind: Input should be 'move'; x: Field required"
    )


@pytest.mark.parametrize(
    ("function", "raw"),
    [(takes_validated, '"x"'), (takes_instance, '{"x":1}'), (takes_tagged, '{"kind":"other"}')],
    ids=["validator", "class", "discriminator"],
)
def test_validation_error_does_not_name_functions_or_classes(function: Any, raw: str) -> None:
    """No name of the application's code reaches a client by way of pydantic."""
    told = validation_error(function, raw).lower()
    assert told
    assert not any(word in told for word in ("inside", "function", "instance of", "class", "()"))


def test_validation_error_truncates_unknown_member_names() -> None:
    """A member that is not known is named as far as it is short: a reply is never as long as its message."""
    assert validation_error(takes_strict, '{"unknown":1}') == "unknown: Extra inputs are not permitted"
    many = ",".join(f'"{number}{"x" * 100_000}":1' for number in range(9))
    told = validation_error(takes_strict, f"{{{many}}}")
    assert len(told) <= MAX_PROBLEMS * (MAX_PROBLEM_CHARS + 2) + len("and 9 more")
    assert told.endswith("and 4 more")


def test_unknown_type_is_escaped_and_truncated_in_error() -> None:
    """The type that nobody handles is quoted, escaped, and cut."""
    handlers = HandlerRegistry()
    handlers.add("chat", takes_any)
    with pytest.raises(InvalidMessageError) as caught:
        handlers.match(ReceivedMessage('{"type":"\\r\\n\\u001b[2J' + "x" * 100_000 + '"}'))
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 200


# ── limits of what is read ──


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
    """What the router would refuse, pydantic is not given either, whether the handler has a type or not."""
    raw = f'{{"type":"chat","text":"hi","x":{value}}}'
    for message in (raw, raw.encode()):
        with pytest.raises(InvalidMessageError, match=what) as caught:
            prepare(function, message, typed=typed)
        assert caught.value.code == "bad_json"


def test_last_of_duplicate_types_selects_handler_and_model() -> None:
    """No message is routed as one type and validated as another."""
    handlers = HandlerRegistry()
    handlers.add("a", takes_loose)
    handlers.add("b", takes_loose)
    received = ReceivedMessage('{"type":"a","type":"b"}')
    (handler,) = handlers.match(received)
    assert handler is handlers.match(ReceivedMessage('{"type":"b"}'))[0]
    assert handler.validate(received).type == "b"


# ── finding ──


def found(handlers: HandlerRegistry, raw: str | bytes) -> list[Any]:
    """The functions that would be called for a message."""
    return [handler.function for handler in handlers.match(ReceivedMessage(raw))]


def test_registry_without_handlers_matches_nothing() -> None:
    """A manager without handlers takes every message and does nothing."""
    handlers = HandlerRegistry()
    assert not handlers
    assert found(handlers, "anything") == []


def test_message_type_selects_its_handler() -> None:
    """The handler of a type is called, and no other."""
    handlers = HandlerRegistry()
    handlers.add("chat", takes_chat)
    handlers.add("move", takes_any)
    assert handlers
    assert found(handlers, TEXT) == [takes_chat]
    assert found(handlers, b'{"type":"move"}') == [takes_any]


@pytest.mark.parametrize("raw", ["plain text", b"\xff", '{"type":"other"}', '{"a":1}', '{"type":7}', "[]"])
def test_unmatched_message_goes_to_catch_all_handler(raw: str | bytes) -> None:
    """A handler without a type gets every message that has no handler of its own, JSON or not."""
    handlers = HandlerRegistry()
    handlers.add("chat", takes_chat)
    handlers.add(None, takes_any)
    assert found(handlers, raw) == [takes_any]
    assert found(handlers, TEXT) == [takes_chat]


def test_catch_all_handler_alone_receives_unparsed_message() -> None:
    """Without typed handlers nothing is parsed to find them."""
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
    """Where all handlers are typed, a message without one of their types is a bad message."""
    handlers = HandlerRegistry()
    handlers.add("chat", takes_chat)
    with pytest.raises(InvalidMessageError) as caught:
        handlers.match(ReceivedMessage(raw))
    assert caught.value.code == code


def test_long_unknown_type_is_truncated_in_error() -> None:
    """A reply does not send back as much as came in."""
    handlers = HandlerRegistry()
    handlers.add("chat", takes_chat)
    with pytest.raises(InvalidMessageError) as caught:
        handlers.match(ReceivedMessage('{"type":"' + "x" * 10_000 + '"}'))
    assert len(caught.value.message) < 200
