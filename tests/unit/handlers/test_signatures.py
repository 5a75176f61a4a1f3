"""Tests of the signatures that handlers and hooks may have."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Protocol

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
    """Message of an application."""

    text: str


class Session:
    """Database session, which no message can become."""


def get_db() -> Session:
    """Return a session, as a dependency."""
    return Session()


SessionDep = Annotated[Session, Depends(get_db)]
TEXT = '{"type":"say","text":"hi"}'


def line_of(function: Callable[..., Any]) -> str:
    """Return the file and line of a function, as an error names it."""
    return f"{__file__}:{inspect.unwrap(function).__code__.co_firstlineno}"


def register_message(function: Any) -> None:
    """Register a message handler."""
    WebSocketConnectionManager().on_message("say")(function)


def register_hook(event: str, function: Any) -> None:
    """Register a hook."""
    getattr(WebSocketConnectionManager(), f"on_{event}")(function)


def registration_error(function: Any, event: str = "message") -> str:
    """Return the error that the registration of a function raises."""
    with pytest.raises(TypeError) as caught:
        register_message(function) if event == "message" else register_hook(event, function)
    return str(caught.value)


# ── parameters of FastAPI endpoints ──


async def default_dependency(ws: StableSocket, message: Say, db: Session = Depends(get_db)) -> None:
    """Take a dependency by default."""


async def annotated_dependency(ws: StableSocket, message: Say, db: SessionDep) -> None:
    """Take a dependency by annotation."""


async def annotated_with_default(ws: StableSocket, message: Say, db: SessionDep = None) -> None:  # type: ignore[assignment]
    """Take a dependency by annotation, with a default."""


async def dependency_for_message(ws: StableSocket, db: Session = Depends(get_db)) -> None:
    """Take a dependency instead of the message."""


async def keyword_dependency(ws: StableSocket, message: Say, *, db: Session = Depends(get_db)) -> None:
    """Take a dependency by keyword."""


async def security(ws: StableSocket, message: Say, user: Any = Security(get_db)) -> None:
    """Take a user by `Security`."""


async def header(ws: StableSocket, message: Say, agent: Annotated[str, Header()] = "") -> None:
    """Take a header."""


async def query(ws: StableSocket, message: Say, q: str = Query("")) -> None:
    """Take a query parameter."""


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
    """A handler with `Depends`, `Header` or the like raises with its location, the parameter and advice."""
    error_text = registration_error(function)
    assert function.__name__ in error_text
    assert line_of(function) in error_text
    assert repr(parameter) in error_text
    assert "for endpoints only" in error_text
    assert "functools.wraps" in error_text


class Dependent:
    """Object with methods that take a dependency."""

    def __call__(self, ws: StableSocket, message: Say, db: Session = Depends(get_db)) -> None:
        """Take a dependency."""

    async def method(self, ws: StableSocket, message: Say, db: SessionDep) -> None:
        """Take a dependency."""

    @classmethod
    def of_class(cls, ws: StableSocket, message: Say, db: SessionDep) -> None:
        """Take a dependency."""

    @staticmethod
    def static(ws: StableSocket, message: Say, db: SessionDep) -> None:
        """Take a dependency."""


@pytest.mark.parametrize(
    "function",
    [
        Dependent(),
        Dependent().method,
        Dependent.of_class,
        Dependent.static,
        functools.partial(default_dependency),
        functools.partial(Dependent().method),
        functools.lru_cache(Dependent.static),
        lambda ws, message, db=Depends(get_db): None,
    ],
)
@pytest.mark.parametrize("event", ["message", "connect", "disconnect"])
def test_callable_of_any_kind_with_dependency_raises(function: Any, event: str) -> None:
    """The rule applies to objects, methods, partials and sync functions, and the error has their location."""
    error_text = registration_error(function, event)
    assert "'db'" in error_text
    assert re.search(r"test_signatures\.py:\d+\)", error_text)


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
    """A handler that takes a request object raises with the attribute of the socket to use instead."""

    async def third(ws: StableSocket, message: Say, more: Any) -> None:
        """Take it after the message."""

    async def second(ws: StableSocket, more: Any = None) -> None:
        """Take it instead of the message."""

    for function in (third, second):
        function.__annotations__["more"] = annotation
        error_text = registration_error(function)
        assert annotation.__name__ in error_text
        assert advice in error_text
        assert line_of(function) in error_text


@pytest.mark.parametrize("event", HOOKS)
def test_hook_with_dependency_raises(event: str) -> None:
    """The rule for message handlers applies to hooks too."""

    async def by_default(first: Any, db: Session = Depends(get_db)) -> None:
        """Take a dependency."""

    async def annotated(first: Any, second: Any, db: SessionDep) -> None:
        """Take a dependency."""

    for function in (by_default, annotated):
        error_text = registration_error(function, event)
        assert f"on_{event}" in error_text
        assert "'db'" in error_text
        assert line_of(function) in error_text


def test_websocket_as_first_parameter_raises() -> None:
    """The first parameter is a `StableSocket`; a FastAPI `WebSocket` there raises."""

    async def takes_websocket(ws: WebSocket, message: Say) -> None:
        """Take the wrong class."""

    assert "ws: StableSocket" in registration_error(takes_websocket)
    assert "ws.websocket" in registration_error(takes_websocket, "disconnect")


def test_stable_socket_dep_annotation_is_accepted() -> None:
    """`ws: StableSocketDep` is accepted, because it names the type that the function gets."""

    async def dep(ws: StableSocketDep, message: Say) -> None:
        """Take the socket."""

    async def default(ws: StableSocket = Depends(stable_socket)) -> None:
        """Take the socket."""

    register_message(dep)
    register_message(default)
    register_hook("connect", default)


def test_protocol_annotation_is_accepted() -> None:
    """A `typing.Protocol` may describe a `StableSocket`, so it is accepted."""

    class Sends(Protocol):
        async def send(self, message: Any) -> None: ...

    async def takes_protocol(ws: Sends, message: Say) -> None:
        """Take the socket."""

    register_message(takes_protocol)


# ── order of parameters ──


async def message_only(message: Say) -> None:
    """Take the message only."""


async def message_first(message: Say, ws: StableSocket) -> None:
    """Take the message first."""


async def bare_message_only(message) -> None:  # type: ignore[no-untyped-def]
    """Take the message only, without an annotation."""


def bare_event_only(event) -> None:  # type: ignore[no-untyped-def]
    """Take the message only, under another name."""


async def bare_message_first(message, ws) -> None:  # type: ignore[no-untyped-def]
    """Take the message first, without annotations."""


async def dict_only(event: dict[str, Any]) -> None:
    """Take a dict only."""


async def text_or_bytes_only(event: str | bytes) -> None:
    """Take the raw message only."""


async def socket_second(anything: Any, ws: StableSocket) -> None:
    """Take the socket second, by annotation."""


async def bare_socket_second(d, ws) -> None:  # type: ignore[no-untyped-def]
    """Take the socket second, by name."""


async def keywords_only(**kw: Any) -> None:
    """Take keyword arguments."""


class Unbound:
    """Class with a method."""

    async def method(self, ws) -> None:  # type: ignore[no-untyped-def]
        """Take an object first."""


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
    """A handler without the socket as its first parameter raises with the signature to write."""
    error_text = registration_error(function)
    assert re.search(r"\(ws: StableSocket, message: \w+", error_text), error_text
    target = function.func if isinstance(function, functools.partial) else function
    assert line_of(target) in error_text


def test_unbound_method_raises_with_hint() -> None:
    """An unbound method raises with the advice to register a bound method."""
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
        ("join", {"person": inspect.Parameter.empty, "room": inspect.Parameter.empty}),
        ("leave", {"presence": inspect.Parameter.empty}),
        ("leave", {"ws": inspect.Parameter.empty}),
        ("disconnect", {"why": inspect.Parameter.empty, "ws": inspect.Parameter.empty}),
    ],
)
def test_hook_with_parameters_in_other_order_raises(event: str, parameters: dict[str, Any]) -> None:
    """A hook with another first parameter than its event passes raises with the right parameter."""
    names = ", ".join(parameters)
    namespace: dict[str, Any] = {}
    exec(f"def hook({names}): pass", namespace)
    hook = namespace["hook"]
    hook.__annotations__ = {name: kind for name, kind in parameters.items() if kind is not inspect.Parameter.empty}
    error_text = registration_error(hook, event)
    assert ("room: Room" if event in ("join", "leave") else "ws: StableSocket") in error_text


@pytest.mark.parametrize("event", SOCKET_HOOKS)
def test_hook_with_event_parameters_is_accepted(event: str) -> None:
    """A hook that takes the arguments of its event, with or without annotations, is accepted."""

    def annotated(ws: StableSocket) -> None:
        """Take the socket."""

    def any_of_it(*args: Any) -> None:
        """Take all arguments."""

    def union(ws: StableSocket | None) -> None:
        """Take the socket."""

    for function in (annotated, any_of_it, union, lambda ws: None, lambda: None):
        register_hook(event, function)


# ── generators and objects that are not functions ──


async def async_generator(ws: StableSocket) -> Any:
    """Yield."""
    yield


def generator(ws: StableSocket) -> Any:
    """Yield."""
    yield


class GeneratorCall:
    """Object with a `__call__` that yields."""

    async def __call__(self, ws: StableSocket) -> Any:
        """Yield."""
        yield


@pytest.mark.parametrize("function", [async_generator, generator, functools.partial(generator), GeneratorCall()])
def test_registering_generator_function_raises(function: Any) -> None:
    """A generator function raises for messages and events, because its body would never run."""
    assert "it contains `yield`, so calling it would not run it" in registration_error(function)
    assert "yield" in registration_error(function, "connect")


@contextlib.asynccontextmanager
async def context_manager(ws: StableSocket) -> Any:
    """Yield."""
    yield


def test_registering_context_manager_raises() -> None:
    """A context manager function raises, because its body would never run."""
    assert "yield" in registration_error(context_manager)
    assert "yield" in registration_error(context_manager, "connect")


@pytest.mark.parametrize("wrong", [5, b"say", ["say"], object()])
def test_on_message_with_invalid_type_raises(wrong: Any) -> None:
    """A message type that is not a text raises."""
    with pytest.raises(TypeError, match=r'write @manager\.on_message\("chat"\)'):
        WebSocketConnectionManager().on_message(wrong)


def test_on_message_with_model_raises() -> None:
    """A model as the type raises with the type name to use."""
    with pytest.raises(TypeError, match=r'write @manager\.on_message\("say"\)'):
        WebSocketConnectionManager().on_message(Say)


def test_hook_without_function_raises() -> None:
    """A hook decorator without a function raises."""
    with pytest.raises(TypeError, match="on_connect takes a function, not 'lobby'"):
        register_hook("connect", "lobby")


# ── decorators ──


def with_db(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Pass a session last."""

    @functools.wraps(handler)
    async def wrapper(ws: StableSocket, message: Any) -> Any:
        return await handler(ws, message, Session())

    return wrapper


def with_db_first(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Pass a session before the socket, with other parameter names."""

    @functools.wraps(handler)
    async def wrapper(socket, content):  # type: ignore[no-untyped-def]
        return await handler(Session(), socket, content)

    return wrapper


def with_db_by_keyword(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Pass a session by keyword, with all arguments."""

    @functools.wraps(handler)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        return await handler(*args, db=Session(), **kwargs)

    return wrapper


def with_db_before(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Pass a session before all arguments."""

    @functools.wraps(handler)
    async def wrapper(*args: Any) -> Any:
        return await handler(Session(), *args)

    return wrapper


def pass_through(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Change nothing."""

    @functools.wraps(handler)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        return await handler(*args, **kwargs)

    return wrapper


def message_alone(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Pass the message only."""

    @functools.wraps(handler)
    async def wrapper(ws: StableSocket, message: Any) -> Any:
        return await handler(message)

    return wrapper


class WithDb:
    """Decorator class."""

    def __init__(self, handler: Callable[..., Any]) -> None:
        functools.update_wrapper(self, handler)
        self.handler = handler

    async def __call__(self, ws: StableSocket, message: Any) -> Any:
        return await self.handler(ws, message, Session())


@with_db
async def decorated(ws: StableSocket, message: Say, db: Session) -> Any:
    """Take a session last."""
    return ws, message, db


@with_db_first
async def decorated_first(db: Session, ws: StableSocket, message: Say) -> Any:
    """Take a session first."""
    return ws, message, db


@with_db_by_keyword
async def decorated_keyword(ws: StableSocket, message: Say, *, db: Session) -> Any:
    """Take a session by keyword."""
    return ws, message, db


@with_db_by_keyword
async def decorated_last(ws: StableSocket, message: Say, db: Session) -> Any:
    """Take a session by name."""
    return ws, message, db


@with_db_before
async def decorated_before(db: Session, ws: StableSocket, message: Say) -> Any:
    """Take a session before the other arguments."""
    return ws, message, db


@pass_through
@with_db
async def decorated_twice(ws: StableSocket, message: Say, db: Session) -> Any:
    """Take a session through two decorators."""
    return ws, message, db


@WithDb
async def decorated_by_class(ws: StableSocket, message: Say, db: Session) -> Any:
    """Take a session from a decorator class."""
    return ws, message, db


class Handlers:
    """Object with a decorated method."""

    @staticmethod
    def opened(method: Callable[..., Any]) -> Callable[..., Any]:
        """Pass a session to a method."""

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
    """A `functools.wraps` decorator is called with its own parameters; the handler's annotation types the message."""
    register_message(function)
    handler = MessageHandler(function, typed=True)
    socket: Any = object()
    ws, message, db = await handler(socket, handler.validate(ReceivedMessage(TEXT)))
    assert ws is socket
    assert message == Say(text="hi")
    assert isinstance(db, Session)


async def test_decorator_dropping_socket_is_accepted() -> None:
    """The signature of the decorator counts, even if it does not pass on the socket."""

    @message_alone
    async def only(message: Say) -> Any:
        """Take the message only."""
        return message

    handler = MessageHandler(only, typed=True)
    assert await handler(None, handler.validate(ReceivedMessage(TEXT))) == Say(text="hi")  # type: ignore[arg-type]


@pytest.mark.parametrize("decorator", [pass_through, with_db])
def test_decorated_handler_with_dependency_raises(decorator: Any) -> None:
    """A decorator does not resolve dependencies of the function that it wraps."""
    wrapped = decorator(default_dependency)
    error_text = registration_error(wrapped)
    assert "'db'" in error_text
    assert line_of(default_dependency) in error_text


async def test_decorated_handler_may_annotate_decorator_arguments() -> None:
    """A decorator with socket and message may pass the wrapped function types that only FastAPI gives to endpoints."""

    def give(handler: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(handler)
        async def wrapper(ws: Any, message: Any) -> Any:
            return await handler(ws, message, Session())

        return wrapper

    @give
    async def with_alias(websocket: WebSocket, message: Say, db: SessionDep) -> Any:
        """Use the annotations of endpoints."""
        return message, db

    handler = MessageHandler(with_alias, typed=True)
    message, db = await handler(None, handler.validate(ReceivedMessage(TEXT)))  # type: ignore[arg-type]
    assert message == Say(text="hi")
    assert isinstance(db, Session)


def test_decorated_handler_without_socket_raises() -> None:
    """A decorator that changes nothing passes the socket first."""
    assert "ws: StableSocket" in registration_error(pass_through(message_only))


def test_decorator_with_extra_parameter_raises() -> None:
    """A decorator that requires a third argument raises."""

    @functools.wraps(message_only)
    async def wrapper(ws: StableSocket, message: Any, db: Session) -> None:
        """Require a third argument."""

    assert "'db'" in registration_error(wrapper)


@pytest.mark.parametrize("event", ["connect", "disconnect"])
async def test_decorated_hook_receives_arguments_of_decorator(event: str) -> None:
    """A decorated hook is called with the decorator's own parameters."""
    seen: list[Any] = []

    def opened(hook: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(hook)
        async def wrapper(ws: StableSocket) -> Any:
            return await hook(ws, Session())

        return wrapper

    @opened
    async def on_event(ws: StableSocket, db: Session) -> None:
        seen.append((ws, type(db)))

    manager = WebSocketConnectionManager()
    getattr(manager, f"on_{event}")(on_event)
    (hook,) = manager._hooks._hooks[event]
    await hook("socket", "reason")
    assert seen == [("socket", Session)]


def test_explicit_signature_is_used_unchanged() -> None:
    """An explicit `__signature__` takes precedence over the wrapped function."""

    async def injected(*args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    injected.__wrapped__ = default_dependency  # type: ignore[attr-defined]
    injected.__signature__ = inspect.signature(decorated, follow_wrapped=False)  # type: ignore[attr-defined]
    assert isinstance(MessageHandler(injected, typed=True).validate(ReceivedMessage(TEXT)), Say)


# ── annotations that cannot be evaluated ──


def test_unresolvable_socket_annotation_is_ignored() -> None:
    """Only the annotation of the message has to be resolvable."""

    async def hinted(ws: OnlyForTypeCheckers, message: Say, more: OnlyForTypeCheckers | None = None) -> None:
        """Have annotations that cannot be resolved."""

    assert isinstance(MessageHandler(hinted, typed=True).validate(ReceivedMessage(TEXT)), Say)


def test_unresolvable_message_annotation_raises() -> None:
    """An unresolvable annotation of the message raises with the handler's location and advice."""

    async def hinted(ws: StableSocket, message: OnlyForTypeCheckers) -> None:
        """Have an annotation that cannot be resolved."""

    error_text = registration_error(hinted)
    assert "hinted" in error_text
    assert line_of(hinted) in error_text
    assert "OnlyForTypeCheckers" in error_text
    assert "TYPE_CHECKING" in error_text
    assert "module level" in error_text


def test_model_of_enclosing_function_is_resolved() -> None:
    """A model defined beside its handler in a function is resolved from its string annotation."""

    class Move(BaseModel):
        """Message of this test."""

        x: int

    async def move(ws: StableSocket, message: Move) -> None:
        """Take the message."""

    assert MessageHandler(move, typed=True).validate(ReceivedMessage('{"x":1}')) == Move(x=1)


def test_model_of_outer_enclosing_function_is_resolved() -> None:
    """A model of an outer enclosing function is resolved too."""

    class Move(BaseModel):
        """Message of this test."""

        x: int

    def build() -> MessageHandler:
        async def move(ws: StableSocket, message: Move) -> None:
            """Take the message."""

        return MessageHandler(move, typed=True)

    assert build().validate(ReceivedMessage('{"x":1}')) == Move(x=1)


def test_model_of_returned_function_raises() -> None:
    """A handler registered after the function of its model has returned raises with the advice to use module level."""

    def build() -> Any:
        class Move(BaseModel):
            """Message of this test."""

        async def move(ws: StableSocket, message: Move) -> None:
            """Take the message."""

        return move

    assert "module level" in registration_error(build())


def test_message_annotation_unknown_to_pydantic_raises() -> None:
    """An annotation that no message can become raises at registration with the handler's location."""

    async def impossible(ws: StableSocket, message: Session) -> None:
        """Take a type that no message can become."""

    error_text = registration_error(impossible)
    assert "impossible" in error_text
    assert line_of(impossible) in error_text
    assert "Session" in error_text


# ── duplicate types ──


def test_second_handler_of_message_type_raises() -> None:
    """A second handler of a type raises with the locations of both."""
    manager = WebSocketConnectionManager()

    @manager.on_message("say")
    async def first(ws: StableSocket) -> None:
        """Take the message."""

    async def second(ws: StableSocket) -> None:
        """Take the message too."""

    with pytest.raises(ValueError, match="'say'") as caught:
        manager.on_message("say")(second)
    error_text = str(caught.value)
    for function in (first, second):
        assert f"{function.__qualname__} ({line_of(function)})" in error_text
