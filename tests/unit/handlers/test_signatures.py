"""Tests of what a function must take to be registered for messages and events."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import pytest
from fastapi import BackgroundTasks, Depends, Header, Query, Request, Response, Security, WebSocket
from pydantic import BaseModel
from starlette.requests import HTTPConnection

from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.dependencies import StableSocketDep, stable_socket
from fastapi_ws_stabilizer.handlers.registry import MessageHandler, ReceivedMessage
from fastapi_ws_stabilizer.hub.presence import Presence
from fastapi_ws_stabilizer.manager import WebSocketConnectionManager
from fastapi_ws_stabilizer.room import Room
from fastapi_ws_stabilizer.socket import StableSocket

if TYPE_CHECKING:
    from decimal import Decimal as OnlyForTypeCheckers

HOOKS = ("handshake", "connect", "disconnect", "resume", "session_end", "auth", "error", "slow", "join", "leave")
SOCKET_HOOKS = HOOKS[:-2]


class Say(BaseModel):
    """A message."""

    text: str


class Session:
    """A database session, which is nothing that a message can be."""


def get_db() -> Session:
    """A dependency."""
    return Session()


SessionDep = Annotated[Session, Depends(get_db)]
TEXT = '{"type":"say","text":"hi"}'


def line_of(function: Callable[..., Any]) -> str:
    """Where a function begins, as a refusal names it."""
    return f"{__file__}:{inspect.unwrap(function).__code__.co_firstlineno}"


def register_message(function: Any) -> None:
    """Register a handler of messages."""
    WebSocketConnectionManager().on_message("say")(function)


def register_hook(event: str, function: Any) -> None:
    """Register a hook."""
    getattr(WebSocketConnectionManager(), f"on_{event}")(function)


def registration_error(function: Any, event: str = "message") -> str:
    """Why a function cannot be registered."""
    with pytest.raises(TypeError) as caught:
        register_message(function) if event == "message" else register_hook(event, function)
    return str(caught.value)


# ── what FastAPI gives to endpoints ──


async def default_dependency(ws: StableSocket, message: Say, db: Session = Depends(get_db)) -> None:
    """Want a dependency by its default."""


async def annotated_dependency(ws: StableSocket, message: Say, db: SessionDep) -> None:
    """Want a dependency by its annotation."""


async def annotated_with_default(ws: StableSocket, message: Say, db: SessionDep = None) -> None:  # type: ignore[assignment]
    """Want a dependency by its annotation, and have a default."""


async def dependency_for_message(ws: StableSocket, db: Session = Depends(get_db)) -> None:
    """Want a dependency where the message comes."""


async def keyword_dependency(ws: StableSocket, message: Say, *, db: Session = Depends(get_db)) -> None:
    """Want a dependency by keyword."""


async def security(ws: StableSocket, message: Say, user: Any = Security(get_db)) -> None:
    """Want a user."""


async def header(ws: StableSocket, message: Say, agent: Annotated[str, Header()] = "") -> None:
    """Want a header."""


async def query(ws: StableSocket, message: Say, q: str = Query("")) -> None:
    """Want a query parameter."""


@pytest.mark.parametrize(
    ("function", "parameter"),
    [
        (default_dependency, "db"),
        (annotated_dependency, "db"),
        (annotated_with_default, "db"),
        (dependency_for_message, "db"),
        (keyword_dependency, "db"),
        (security, "user"),
        (header, "agent"),
        (query, "q"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_message_handler_with_fastapi_parameter_raises(function: Any, parameter: str) -> None:
    """A handler with `Depends`, `Header` or the like is refused with its place, its parameter and what to do."""
    told = registration_error(function)
    assert function.__name__ in told
    assert line_of(function) in told
    assert repr(parameter) in told
    assert "later version" in told
    assert "functools.wraps" in told


class Wants:
    """An object that wants a dependency, however it is called."""

    def __call__(self, ws: StableSocket, message: Say, db: Session = Depends(get_db)) -> None:
        """Want a dependency."""

    async def method(self, ws: StableSocket, message: Say, db: SessionDep) -> None:
        """Want a dependency."""

    @classmethod
    def of_class(cls, ws: StableSocket, message: Say, db: SessionDep) -> None:
        """Want a dependency."""

    @staticmethod
    def static(ws: StableSocket, message: Say, db: SessionDep) -> None:
        """Want a dependency."""


@pytest.mark.parametrize(
    "function",
    [
        Wants(),
        Wants().method,
        Wants.of_class,
        Wants.static,
        functools.partial(default_dependency),
        functools.partial(Wants().method),
        functools.lru_cache(Wants.static),
        lambda ws, message, db=Depends(get_db): None,
    ],
)
@pytest.mark.parametrize("event", ["message", "connect", "disconnect"])
def test_callable_of_any_kind_with_dependency_raises(function: Any, event: str) -> None:
    """Objects, methods, partials and functions that are not async are held to the same rule, with their place."""
    told = registration_error(function, event)
    assert "'db'" in told
    assert re.search(r"test_signatures\.py:\d+\)", told)


@pytest.mark.parametrize(
    ("annotation", "advice"),
    [
        (BackgroundTasks, "ws.create_task"),
        (Request, "ws.websocket"),
        (WebSocket, "ws.websocket"),
        (HTTPConnection, "ws.websocket"),
        (Response, "ws.accept_headers"),
    ],
)
def test_message_handler_with_starlette_parameter_raises(annotation: Any, advice: str) -> None:
    """A handler that wants an object of the request is told where a socket has it."""

    async def third(ws: StableSocket, message: Say, more: Any) -> None:
        """Want it beside the message."""

    async def second(ws: StableSocket, more: Any = None) -> None:
        """Want it in the place of the message."""

    for function in (third, second):
        function.__annotations__["more"] = annotation
        told = registration_error(function)
        assert annotation.__name__ in told
        assert advice in told
        assert line_of(function) in told


@pytest.mark.parametrize("event", HOOKS)
def test_hook_with_dependency_raises(event: str) -> None:
    """Hooks are held to the same rule as handlers of messages."""

    async def by_default(first: Any, db: Session = Depends(get_db)) -> None:
        """Want a dependency."""

    async def annotated(first: Any, second: Any, db: SessionDep) -> None:
        """Want a dependency."""

    for function in (by_default, annotated):
        told = registration_error(function, event)
        assert f"on_{event}" in told
        assert "'db'" in told
        assert line_of(function) in told


def test_websocket_as_first_parameter_raises() -> None:
    """The first parameter is a `StableSocket`, and not the WebSocket that FastAPI gives to endpoints."""

    async def takes_websocket(ws: WebSocket, message: Say) -> None:
        """Want the wrong class."""

    assert "ws: StableSocket" in registration_error(takes_websocket)
    assert "ws.websocket" in registration_error(takes_websocket, "disconnect")


def test_stable_socket_dep_annotation_is_accepted() -> None:
    """`ws: StableSocketDep` names what the function gets, so it stays allowed."""

    async def dep(ws: StableSocketDep, message: Say) -> None:
        """Take the socket."""

    async def default(ws: StableSocket = Depends(stable_socket)) -> None:
        """Take the socket."""

    register_message(dep)
    register_message(default)
    register_hook("connect", default)


# ── the order of parameters ──


async def message_only(message: Say) -> None:
    """Want the message only."""


async def message_first(message: Say, ws: StableSocket) -> None:
    """Want the message first."""


async def bare_message_only(message) -> None:  # type: ignore[no-untyped-def]
    """Want the message only, without an annotation."""


def bare_event_only(event) -> None:  # type: ignore[no-untyped-def]
    """Want the message only, by another name."""


async def bare_message_first(message, ws) -> None:  # type: ignore[no-untyped-def]
    """Want the message first, without annotations."""


async def dict_only(event: dict[str, Any]) -> None:
    """Want an object."""


async def text_or_bytes_only(event: str | bytes) -> None:
    """Want the message as it came."""


async def socket_second(anything: Any, ws: StableSocket) -> None:
    """Want the socket second."""


async def bare_socket_second(d, ws) -> None:  # type: ignore[no-untyped-def]
    """Want the socket second, as its name says."""


async def keywords_only(**kw: Any) -> None:
    """Want keyword arguments."""


class Unbound:
    """A class with a method."""

    async def method(self, ws) -> None:  # type: ignore[no-untyped-def]
        """Want an object first."""


@pytest.mark.parametrize(
    "function",
    [
        message_only,
        message_first,
        bare_message_only,
        bare_event_only,
        bare_message_first,
        dict_only,
        text_or_bytes_only,
        socket_second,
        bare_socket_second,
        keywords_only,
        Unbound.method,
        functools.partial(message_only),
    ],
    ids=lambda value: getattr(value, "__name__", "partial"),
)
def test_message_handler_without_socket_first_raises(function: Any) -> None:
    """A handler whose first parameter is not the socket is refused with what to write."""
    told = registration_error(function)
    assert re.search(r"\(ws: StableSocket, message: \w+", told), told
    target = function.func if isinstance(function, functools.partial) else function
    assert line_of(target) in told


def test_unbound_method_raises_with_hint() -> None:
    """A function with `self` is registered on an object."""
    assert "bound method" in registration_error(Unbound.method)


@pytest.mark.parametrize(
    ("event", "parameters"),
    [
        ("disconnect", {"reason": DisconnectReason}),
        ("disconnect", {"reason": inspect.Parameter.empty}),
        ("disconnect", {"reason": DisconnectReason, "ws": StableSocket}),
        ("error", {"error": Exception}),
        ("error", {"exc": inspect.Parameter.empty, "ws": StableSocket}),
        ("auth", {"token": str, "ws": StableSocket}),
        ("join", {"who": Presence}),
        ("join", {"ws": StableSocket}),
        ("leave", {"who": Presence, "room": Room}),
        ("connect", {"room": Room}),
        ("join", {"who": inspect.Parameter.empty, "room": inspect.Parameter.empty}),
        ("join", {"somebody": inspect.Parameter.empty, "room": inspect.Parameter.empty}),
        ("leave", {"presence": inspect.Parameter.empty}),
        ("leave", {"ws": inspect.Parameter.empty}),
        ("disconnect", {"why": inspect.Parameter.empty, "ws": inspect.Parameter.empty}),
    ],
)
def test_hook_with_parameters_in_other_order_raises(event: str, parameters: dict[str, Any]) -> None:
    """A hook whose first parameter is not what it gets first is refused with what it gets."""
    names = ", ".join(parameters)
    namespace: dict[str, Any] = {}
    exec(f"def hook({names}): pass", namespace)
    hook = namespace["hook"]
    hook.__annotations__ = {name: kind for name, kind in parameters.items() if kind is not inspect.Parameter.empty}
    told = registration_error(hook, event)
    assert ("room: Room" if event in ("join", "leave") else "ws: StableSocket") in told


@pytest.mark.parametrize("event", SOCKET_HOOKS)
def test_hook_with_event_parameters_is_accepted(event: str) -> None:
    """A hook that takes what its event gives, with or without annotations, is registered."""

    def annotated(ws: StableSocket) -> None:
        """Take the socket."""

    def any_of_it(*args: Any) -> None:
        """Take all."""

    def union(ws: StableSocket | None) -> None:
        """Take the socket."""

    for function in (annotated, any_of_it, union, lambda ws: None, lambda: None):
        register_hook(event, function)


# ── generators, and what is no function ──


async def async_generator(ws: StableSocket) -> Any:
    """Yield."""
    yield


def generator(ws: StableSocket) -> Any:
    """Yield."""
    yield


class GeneratorCall:
    """An object whose call yields."""

    async def __call__(self, ws: StableSocket) -> Any:
        """Yield."""
        yield


@pytest.mark.parametrize("function", [async_generator, generator, functools.partial(generator), GeneratorCall()])
def test_registering_generator_function_raises(function: Any) -> None:
    """A function that yields would never run: it is refused for messages and events."""
    assert "yield" in registration_error(function)
    assert "yield" in registration_error(function, "connect")


@contextlib.asynccontextmanager
async def context_manager(ws: StableSocket) -> Any:
    """Yield."""
    yield


def test_registering_context_manager_raises() -> None:
    """A function that makes a context manager would never be entered."""
    assert "yield" in registration_error(context_manager)
    assert "yield" in registration_error(context_manager, "connect")


@pytest.mark.parametrize("wrong", [5, b"say", ["say"], object()])
def test_on_message_with_invalid_type_raises(wrong: Any) -> None:
    """A type of message is a text."""
    with pytest.raises(TypeError, match=r'write @manager\.on_message\("chat"\)'):
        WebSocketConnectionManager().on_message(wrong)


def test_on_message_with_model_raises() -> None:
    """A model is the annotation of the message, and the decorator takes its type."""
    with pytest.raises(TypeError, match=r'write @manager\.on_message\("say"\)'):
        WebSocketConnectionManager().on_message(Say)


def test_hook_without_function_raises() -> None:
    """An event is a decorator of its own, which takes a function."""
    with pytest.raises(TypeError, match="on_connect takes a function, not 'lobby'"):
        register_hook("connect", "lobby")


# ── decorators ──


def with_db(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Open a session for each message."""

    @functools.wraps(handler)
    async def wrapper(ws: StableSocket, message: Any) -> Any:
        return await handler(ws, message, Session())

    return wrapper


def with_db_first(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Put the session before the socket, with other names."""

    @functools.wraps(handler)
    async def wrapper(socket, content):  # type: ignore[no-untyped-def]
        return await handler(Session(), socket, content)

    return wrapper


def with_db_by_keyword(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Take what comes."""

    @functools.wraps(handler)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        return await handler(*args, db=Session(), **kwargs)

    return wrapper


def with_db_before(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Put the session before what comes."""

    @functools.wraps(handler)
    async def wrapper(*args: Any) -> Any:
        return await handler(Session(), *args)

    return wrapper


def passes_on(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Change nothing."""

    @functools.wraps(handler)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        return await handler(*args, **kwargs)

    return wrapper


def message_alone(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Give the message only."""

    @functools.wraps(handler)
    async def wrapper(ws: StableSocket, message: Any) -> Any:
        return await handler(message)

    return wrapper


class WithDb:
    """A decorator that is a class."""

    def __init__(self, handler: Callable[..., Any]) -> None:
        functools.update_wrapper(self, handler)
        self.handler = handler

    async def __call__(self, ws: StableSocket, message: Any) -> Any:
        return await self.handler(ws, message, Session())


@with_db
async def decorated(ws: StableSocket, message: Say, db: Session) -> Any:
    """Get a session last."""
    return ws, message, db


@with_db_first
async def decorated_first(db: Session, ws: StableSocket, message: Say) -> Any:
    """Get a session first."""
    return ws, message, db


@with_db_by_keyword
async def decorated_keyword(ws: StableSocket, message: Say, *, db: Session) -> Any:
    """Get a session by keyword."""
    return ws, message, db


@with_db_by_keyword
async def decorated_last(ws: StableSocket, message: Say, db: Session) -> Any:
    """Get a session by name."""
    return ws, message, db


@with_db_before
async def decorated_before(db: Session, ws: StableSocket, message: Say) -> Any:
    """Get a session before what comes."""
    return ws, message, db


@passes_on
@with_db
async def decorated_twice(ws: StableSocket, message: Say, db: Session) -> Any:
    """Get a session through two decorators."""
    return ws, message, db


@WithDb
async def decorated_by_class(ws: StableSocket, message: Say, db: Session) -> Any:
    """Get a session from an object."""
    return ws, message, db


class Handlers:
    """An object with a decorated method."""

    @staticmethod
    def opened(method: Callable[..., Any]) -> Callable[..., Any]:
        """Open a session for a method."""

        @functools.wraps(method)
        async def wrapper(self: Any, ws: StableSocket, message: Any) -> Any:
            return await method(self, ws, message, Session())

        return wrapper


async def _method(self: Any, ws: StableSocket, message: Say, db: Session) -> Any:
    return ws, message, db


Handlers.method = Handlers.opened(_method)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "function",
    [
        decorated,
        decorated_first,
        decorated_keyword,
        decorated_last,
        decorated_before,
        decorated_twice,
        decorated_by_class,
        functools.partial(decorated),
        Handlers().method,  # type: ignore[attr-defined]
    ],
    ids=lambda value: getattr(value, "__name__", "partial"),
)
async def test_decorated_handler_receives_arguments_of_decorator(function: Any) -> None:
    """A `functools.wraps` decorator is called by its own parameters, and the message is what the handler wants."""
    register_message(function)
    handler = MessageHandler(function, typed=True)
    socket: Any = object()
    ws, message, db = await handler(socket, handler.validate(ReceivedMessage(TEXT)))
    assert ws is socket
    assert message == Say(text="hi")
    assert isinstance(db, Session)


async def test_decorator_dropping_socket_is_accepted() -> None:
    """What counts is what the decorator takes."""

    @message_alone
    async def only(message: Say) -> Any:
        """Get the message only."""
        return message

    handler = MessageHandler(only, typed=True)
    assert await handler(None, handler.validate(ReceivedMessage(TEXT))) == Say(text="hi")  # type: ignore[arg-type]


@pytest.mark.parametrize("decorator", [passes_on, with_db])
def test_decorated_handler_with_dependency_raises(decorator: Any) -> None:
    """A decorator does not solve the dependencies of the function that it wraps."""
    wrapped = decorator(default_dependency)
    told = registration_error(wrapped)
    assert "'db'" in told
    assert line_of(default_dependency) in told


async def test_decorated_handler_may_annotate_decorator_arguments() -> None:
    """A decorator that takes socket and message may give the function below what only FastAPI gives to endpoints."""

    def gives(handler: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(handler)
        async def wrapper(ws: Any, message: Any) -> Any:
            return await handler(ws, message, Session())

        return wrapper

    @gives
    async def with_alias(websocket: WebSocket, message: Say, db: SessionDep) -> Any:
        """Name the type by the alias that endpoints use."""
        return message, db

    handler = MessageHandler(with_alias, typed=True)
    message, db = await handler(None, handler.validate(ReceivedMessage(TEXT)))  # type: ignore[arg-type]
    assert message == Say(text="hi")
    assert isinstance(db, Session)


def test_decorated_handler_without_socket_raises() -> None:
    """A decorator that changes nothing gives the socket first."""
    assert "ws: StableSocket" in registration_error(passes_on(message_only))


def test_decorator_with_extra_parameter_raises() -> None:
    """A decorator that needs a third argument cannot be called, whatever it wraps."""

    @functools.wraps(message_only)
    async def wrapper(ws: StableSocket, message: Any, db: Session) -> None:
        """Want too much."""

    assert "'db'" in registration_error(wrapper)


@pytest.mark.parametrize("event", ["connect", "disconnect"])
async def test_decorated_hook_receives_arguments_of_decorator(event: str) -> None:
    """Hooks with a decorator are called by the decorator's own parameters."""
    seen: list[Any] = []

    def opened(hook: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(hook)
        async def wrapper(ws: StableSocket) -> Any:
            return await hook(ws, Session())

        return wrapper

    @opened
    async def came(ws: StableSocket, db: Session) -> None:
        seen.append((ws, type(db)))

    manager = WebSocketConnectionManager()
    getattr(manager, f"on_{event}")(came)
    (hook,) = manager._hooks._hooks[event]
    await hook("socket", "reason")
    assert seen == [("socket", Session)]


def test_explicit_signature_is_used_unchanged() -> None:
    """A decorator that states its signature is not looked through."""

    async def injected(*args: Any, **kwargs: Any) -> None:
        """Be called."""

    injected.__wrapped__ = default_dependency  # type: ignore[attr-defined]
    injected.__signature__ = inspect.signature(decorated, follow_wrapped=False)  # type: ignore[attr-defined]
    assert isinstance(MessageHandler(injected, typed=True).validate(ReceivedMessage(TEXT)), Say)


# ── annotations that cannot be evaluated ──


def test_unresolvable_socket_annotation_is_ignored() -> None:
    """Only the annotation of the message is needed at run time."""

    async def hinted(ws: OnlyForTypeCheckers, message: Say, more: OnlyForTypeCheckers | None = None) -> None:
        """Have annotations that cannot be evaluated."""

    assert isinstance(MessageHandler(hinted, typed=True).validate(ReceivedMessage(TEXT)), Say)


def test_unresolvable_message_annotation_raises() -> None:
    """An annotation of the message that cannot be evaluated is refused with the handler's place and a cure."""

    async def hinted(ws: StableSocket, message: OnlyForTypeCheckers) -> None:
        """Have an annotation that cannot be evaluated."""

    told = registration_error(hinted)
    assert "hinted" in told
    assert line_of(hinted) in told
    assert "OnlyForTypeCheckers" in told
    assert "TYPE_CHECKING" in told
    assert "module level" in told


def test_model_of_enclosing_function_is_resolved() -> None:
    """A model that is defined beside its handler, in a function, is found although annotations are texts."""

    class Move(BaseModel):
        """A message of this test."""

        x: int

    async def move(ws: StableSocket, message: Move) -> None:
        """Take it."""

    assert MessageHandler(move, typed=True).validate(ReceivedMessage('{"x":1}')) == Move(x=1)


def test_model_of_outer_enclosing_function_is_resolved() -> None:
    """A model of the function around the function around is found too."""

    class Move(BaseModel):
        """A message of this test."""

        x: int

    def build() -> MessageHandler:
        async def move(ws: StableSocket, message: Move) -> None:
            """Take it."""

        return MessageHandler(move, typed=True)

    assert build().validate(ReceivedMessage('{"x":1}')) == Move(x=1)


def test_model_of_returned_function_raises() -> None:
    """A handler that is registered after its function has returned is told to have its model at module level."""

    def build() -> Any:
        class Move(BaseModel):
            """A message."""

        async def move(ws: StableSocket, message: Move) -> None:
            """Take it."""

        return move

    assert "module level" in registration_error(build())


def test_message_annotation_unknown_to_pydantic_raises() -> None:
    """What no message can become is refused with the place, and not at the first message."""

    async def impossible(ws: StableSocket, message: Session) -> None:
        """Want what no message can be."""

    told = registration_error(impossible)
    assert "impossible" in told
    assert line_of(impossible) in told
    assert "Session" in told


# ── the same type twice ──


def test_second_handler_of_message_type_raises() -> None:
    """A type has one handler: a second one is refused with the places of both."""
    manager = WebSocketConnectionManager()

    @manager.on_message("say")
    async def first(ws: StableSocket) -> None:
        """Take it."""

    async def second(ws: StableSocket) -> None:
        """Take it too."""

    with pytest.raises(ValueError, match="'say'") as caught:
        manager.on_message("say")(second)
    told = str(caught.value)
    for function in (first, second):
        assert f"{function.__qualname__} ({line_of(function)})" in told
