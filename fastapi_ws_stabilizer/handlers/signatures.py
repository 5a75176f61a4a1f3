"""What a registered function takes, and which functions cannot be called rightly.

A function is looked at once, when it is registered: what would go wrong at the first message is refused there, with the
place of the function and with what to write.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Final, TypeVar, Union

from fastapi import BackgroundTasks, Response, params
from fastapi.security import SecurityScopes
from starlette.background import BackgroundTasks as StarletteBackgroundTasks
from starlette.requests import HTTPConnection

from fastapi_ws_stabilizer.room import Room
from fastapi_ws_stabilizer.socket import StableSocket

_MAX_WRAPPERS: Final = 32
"""How many decorators are looked through."""

_MAX_FRAMES: Final = 64
"""How far up the stack the function is looked for that defines a handler."""

_EMPTY: Final = inspect.Parameter.empty
_POSITIONAL: Final = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_MARKERS: Final = (params.Depends, params.Param, params.Body)

_WRITTEN: Final = {
    "the socket": "ws: StableSocket",
    "the message": "message: YourModel",
    "the reason": "reason: DisconnectReason",
    "a ResumeOutcome": "outcome: ResumeOutcome",
    "the credential": "credential: str | None",
    "the error": "error: BaseException",
    "a SlowConsumer": "how: SlowConsumer",
    "the room": "room: Room",
    "a Presence": "who: Presence",
}
"""What a function can get, and the parameter for it."""

_FIRST: Final[Mapping[str, type]] = {"the socket": StableSocket, "the room": Room}
"""What a function gets first."""

_SECOND_NAMES: Final = frozenset(
    {
        "message",
        "msg",
        "payload",
        "data",
        "event",
        "text",
        "body",
        "content",
        "json",
        "reason",
        "outcome",
        "credential",
        "token",
        "error",
        "exc",
        "exception",
    }
)
"""Names without an annotation that say that a parameter is meant for what comes second."""

_SOCKET_NAMES: Final = frozenset({"ws", "socket", "websocket", "sock"})
_NAMES: Final[Mapping[str, frozenset[str]]] = {"the socket": _SOCKET_NAMES, "the room": frozenset({"room"})}
"""Names without an annotation that say that a parameter is meant for what comes first."""

_OTHER_NAMES: Final[Mapping[str, frozenset[str]]] = {
    "the socket": _SECOND_NAMES,
    "the room": _SECOND_NAMES | _SOCKET_NAMES | {"who", "presence", "member"},
}
"""Names without an annotation that say that a parameter is not meant for what comes first."""

_ELSEWHERE: Final[tuple[tuple[tuple[type, ...], str], ...]] = (
    ((HTTPConnection,), "Starlette's WebSocket of a connection is ws.websocket"),
    ((BackgroundTasks, StarletteBackgroundTasks), "start the work with ws.create_task(...)"),
    ((Response,), "headers of the answer to a handshake are set in ws.accept_headers, in an on_handshake function"),
    ((SecurityScopes,), "scopes are known to the dependency of manager.socket_for(...)"),
)
"""What FastAPI gives to endpoints only, and where a registered function finds the same."""

_NO_DEPENDENCIES: Final = (
    "FastAPI solves that for endpoints only, and this library for its functions in a later version. Until then open "
    "what you need in the function itself, or in a decorator with functools.wraps that passes it on"
)


class Signature:
    """The parameters of one function that is being registered.

    A decorator made with `functools.wraps` is looked at by its own parameters, since it is what is called. Where it
    takes any number (`*args`), the function that it wraps says what it is for.

    Args:
        function: The function.
        event: What it is registered for, such as `on_message`.
        shape: What it gets, in order, in words.

    Attributes:
        arguments: How many of them it is called with.

    Raises:
        TypeError: It cannot be called with them. The error names the function, its place, and what to write.
    """

    __slots__ = ("_chain", "_event", "_function", "_offset", "_shape", "_source", "arguments")

    def __init__(self, function: Callable[..., Any], event: str, shape: Sequence[str]) -> None:
        self._function = function
        self._event = event
        self._shape = shape
        if not callable(function):
            raise TypeError(f"{event} takes a function, not {function!r}: write @manager.{event} above one")
        if _yields(function):
            raise self._refusal(
                "it has a yield, and would never run: let it return, and send with ws.send(...)", "must not yield"
            )
        self._chain = list(_chain(function))
        self._check_what_fastapi_gives()
        self._check_keywords()
        self._source, self._offset, self.arguments = self._find_arguments()
        if self._source is not None:
            self._check_order(self._source)

    @property
    def message_annotation(self) -> Any:
        """The annotation of the second parameter, evaluated; `Parameter.empty` if it has none.

        Raises:
            TypeError: It cannot be evaluated.
        """
        annotation = self._raw_annotation()
        if annotation is _EMPTY:
            return _EMPTY
        try:
            return self._evaluated(annotation)
        except Exception as error:
            raise self.cannot_be_read(annotation, error) from error

    def cannot_be_read(self, annotation: Any, error: Exception) -> TypeError:
        """The refusal of a function whose message annotation is of no use."""
        shown = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", repr(annotation))
        if isinstance(error, NameError):
            return self._refusal(
                f"the annotation of its message, {shown!r}, cannot be evaluated ({error}): import that name at run "
                "time, outside `if TYPE_CHECKING:`, or define it at module level"
            )
        first_line = str(error).strip().split("\n", 1)[0]
        return self._refusal(
            f"its message cannot be {shown!r} ({first_line}): annotate it with a pydantic model, dict, str, bytes, or "
            "another type that pydantic validates"
        )

    # ── the checks ──

    def _refusal(self, problem: str, rule: str = "") -> TypeError:
        rule = rule or f"must take {_in_words(self._shape)}"
        return TypeError(f"{described(self._function)} cannot be an {self._event} function: it {rule}; {problem}")

    @property
    def _advice(self) -> str:
        return f"write {_name(self._function)}({', '.join(_WRITTEN[word] for word in self._shape)})"

    def _check_what_fastapi_gives(self) -> None:
        """Refuse what only FastAPI could give.

        A decorator that takes its own parameters may give the function below what that names in an annotation; a
        default such as `Depends(...)` would stay there unnoticed if it did not.
        """
        given = False
        for function, parameters in self._chain:
            first = True
            for parameter in parameters:
                annotation = self._evaluated_or_none(parameter.annotation)
                is_first, first = first, False
                marker = _marker(parameter.default) or (None if given else _marker(annotation))
                if marker is not None and not (is_first and self._is_first_thing(annotation)):
                    raise TypeError(
                        f"{described(function)} cannot be an {self._event} function: its parameter {parameter.name!r} "
                        f"is {type(marker).__name__}(...). {_NO_DEPENDENCIES}"
                    )
                for kinds, advice in _ELSEWHERE:
                    if not given and _is_plain_class(annotation) and issubclass(annotation, kinds):
                        raise TypeError(
                            f"{described(function)} cannot be an {self._event} function: its parameter "
                            f"{parameter.name!r} is a {annotation.__name__}, which FastAPI gives to endpoints only: "
                            f"{advice}; {self._advice}"
                        )
            given = given or not _takes_any_number(parameters)

    def _check_keywords(self) -> None:
        parameters = self._chain[0][1]
        for parameter in parameters:
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY and parameter.default is _EMPTY:
                raise self._refusal(f"it needs the keyword argument {parameter.name!r}, which nothing gives it")
        if parameters and all(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            raise self._refusal(
                f"**{parameters[0].name} takes keyword arguments, which nothing gives it: {self._advice}"
            )

    def _find_arguments(self) -> tuple[list[inspect.Parameter] | None, int, int]:
        """The parameters that count, where among them the first argument goes, and how many arguments there are."""
        most = len(self._shape)
        for depth, (_, parameters) in enumerate(self._chain):
            if _takes_any_number(parameters):
                continue
            positional = [parameter for parameter in parameters if parameter.kind in _POSITIONAL]
            if depth == 0:
                needed = [parameter for parameter in positional if parameter.default is _EMPTY]
                if len(needed) > most:
                    more = ", ".join(repr(parameter.name) for parameter in needed[most:])
                    raise self._refusal(f"nothing gives it {more}: {self._advice}")
                return positional, 0, min(most, len(positional))
            offset = self._place_of_first(positional) or 0
            return positional, offset, min(most, len(positional) - offset)
        return None, 0, most

    def _check_order(self, positional: list[inspect.Parameter]) -> None:
        """Refuse a function that takes something else where it gets the socket, or the room."""
        if not positional:
            return
        first = positional[self._offset]
        if first.name in ("self", "cls") and first.annotation is _EMPTY:
            raise self._refusal(
                f"{first.name!r} is no argument: register the bound method of an object; {self._advice}"
            )
        annotation = self._evaluated_or_none(first.annotation)
        fits = None if annotation is _EMPTY else _can_be(annotation, self._first_thing)
        index = self._place_of_first(positional)
        if fits is False or (fits is None and (index or 0) > self._offset):
            raise self._refusal(f"its first parameter, {first.name!r}, is something else: {self._advice}")
        if fits is not None or self._says_first(first.annotation):
            return
        what = self._shape[0]
        if first.name in _OTHER_NAMES[what]:
            raise self._refusal(f"its first parameter is called {first.name!r} and would be {what}: {self._advice}")
        if first.name in _NAMES[what] or _takes_any_number(
            self._chain[0][1]
        ):  # a decorator may give other things first
            return
        for later in positional[1:]:
            if later.name in _NAMES[what] and later.annotation is _EMPTY:
                raise self._refusal(
                    f"its first parameter, {first.name!r}, would be {what}, and a later one is called {later.name!r}: "
                    f"{self._advice}"
                )

    # ── reading annotations ──

    @property
    def _first_thing(self) -> type:
        return _FIRST[self._shape[0]]

    def _is_first_thing(self, annotation: Any) -> bool:
        return _can_be(annotation, self._first_thing) is True

    def _says_first(self, annotation: Any) -> bool:
        """Whether an annotation that cannot be evaluated is the name of what comes first."""
        return isinstance(annotation, str) and self._first_thing.__name__ in annotation

    def _place_of_first(self, parameters: list[inspect.Parameter]) -> int | None:
        """Which parameter is annotated as the socket, or the room."""
        for number, parameter in enumerate(parameters):
            if self._is_first_thing(self._evaluated_or_none(parameter.annotation)):
                return number
            if self._says_first(parameter.annotation):
                return number
        return None

    def _raw_annotation(self) -> Any:
        if self._source is None or self.arguments < 2:
            return _EMPTY
        parameter = self._source[self._offset + 1]
        wraps = len(self._chain) > 1
        if parameter.annotation is not _EMPTY and not (wraps and self._evaluated_or_none(parameter.annotation) is Any):
            return parameter.annotation
        for _, parameters in self._chain[1:]:  # a decorator may have no annotations, or other names
            named = [one for one in parameters if one.name == parameter.name]
            if not named:
                positional = [one for one in parameters if one.kind in _POSITIONAL]
                index = (self._place_of_first(positional) or 0) + 1
                named = positional[index : index + 1]
            if named and named[0].annotation is not _EMPTY:
                return named[0].annotation
        return parameter.annotation

    def _evaluated_or_none(self, annotation: Any) -> Any:
        """As `_evaluated`; `None` for what cannot be evaluated, which does not matter there."""
        try:
            return self._evaluated(annotation)
        except Exception:
            return None

    def _evaluated(self, annotation: Any) -> Any:
        """An annotation with all names in it replaced by what they stand for.

        Raises:
            Exception: It cannot be evaluated; most often a `NameError`.
        """
        problems: list[Exception] = []
        for function, _ in reversed(self._chain):  # functools.wraps copies the annotations of the innermost function
            names, local = _namespace(function)
            try:
                return _hint(annotation, names, local)
            except Exception as error:
                problems.append(error)
        raise problems[0]


def described(function: Any) -> str:
    """A function's name and its place, `say (/srv/app.py:12)`."""
    code = getattr(_innermost(function), "__code__", None)
    name = _name(function)
    return name if code is None else f"{name} ({code.co_filename}:{code.co_firstlineno})"


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling `function` gives a coroutine; sees through partials and objects with `async __call__`."""
    return _has(function, inspect.iscoroutinefunction)


def _has(function: Any, kind: Callable[[Any], bool]) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return kind(function) or kind(getattr(function, "__call__", None))  # noqa: B004 (it is the method itself that is looked at)


def _yields(function: Any) -> bool:
    """Whether calling a function runs nothing of it, because it is a generator, or makes a context manager of one."""
    if _has(function, inspect.isasyncgenfunction) or _has(function, inspect.isgeneratorfunction):
        return True
    code = getattr(function, "__code__", None)
    return isinstance(code, types.CodeType) and code.co_filename == contextlib.__file__


def _in_words(shape: Sequence[str]) -> str:
    return f"{shape[0]}, and {shape[1]} if it wants it" if len(shape) > 1 else shape[0]


def _name(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__qualname__", None)
    return name if isinstance(name, str) else type(function).__qualname__


def _innermost(function: Any) -> Any:
    """What a function has been made from by partials, decorators and classes."""
    for _ in range(_MAX_WRAPPERS):
        if isinstance(function, functools.partial):
            function = function.func
        elif (wrapped := _wrapped(function)) is not None:
            function = wrapped
        elif inspect.isroutine(function) or inspect.isclass(function):
            break
        else:
            function = type(function).__call__
    return function


def _wrapped(function: Any) -> Any:
    """What a decorator says that it wraps, if that is something of Python's own making."""
    wrapped = getattr(function, "__wrapped__", None)
    return wrapped if callable(wrapped) else None


def _chain(function: Any) -> Iterator[tuple[Any, list[inspect.Parameter]]]:
    """A function and what it wraps, the outermost first, each with its own parameters."""
    for _ in range(_MAX_WRAPPERS):
        try:
            signature = inspect.signature(function, follow_wrapped=False)
        except (ValueError, TypeError):  # it is written in C and does not say, or a partial of something else
            yield function, [inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)]
        else:
            yield function, list(signature.parameters.values())
        function = _beneath(function)
        if function is None:
            return


def _beneath(function: Any) -> Any:
    """What a function wraps, bound as it is itself; `None` if it wraps nothing, or says its signature itself."""
    if getattr(function, "__signature__", None) is not None:
        return None
    if isinstance(function, functools.partial):
        inner = _beneath(function.func)
        return None if inner is None else functools.partial(inner, *function.args, **function.keywords)
    if inspect.ismethod(function):
        inner = _beneath(function.__func__)
        return None if inner is None else types.MethodType(inner, function.__self__)
    if (wrapped := _wrapped(function)) is not None:
        return wrapped
    if inspect.isroutine(function) or inspect.isclass(function):
        return None
    return _beneath(function.__call__) if inspect.ismethod(function.__call__) else None


def _takes_any_number(parameters: list[inspect.Parameter]) -> bool:
    return any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters)


def _marker(value: Any) -> Any:
    """FastAPI's `Depends`, `Header` or the like, as a default or in an annotation; `None` if there is none."""
    if isinstance(value, _MARKERS):
        return value
    if typing.get_origin(value) is Annotated:
        return next((one for one in value.__metadata__ if isinstance(one, _MARKERS)), None)
    return None


def _can_be(annotation: Any, wanted: type) -> bool | None:
    """Whether an object of a class fits an annotation; `None` where that is not known."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _can_be(annotation.__origin__, wanted)
    if origin is Union or origin is types.UnionType:
        answers = [_can_be(one, wanted) for one in typing.get_args(annotation)]
        return True if True in answers else None if None in answers else False
    if annotation in (None, Any, object, _EMPTY) or isinstance(annotation, (str, TypeVar)):
        return None
    if annotation is type(None):
        return False
    if _is_plain_class(annotation):
        if getattr(annotation, "_is_protocol", False):
            return None
        return issubclass(wanted, annotation) or issubclass(annotation, wanted)
    return None if origin is None else False


def _hint(annotation: Any, names: dict[str, Any], local: dict[str, Any]) -> Any:
    """Evaluate an annotation, texts within it too."""

    def holder() -> None:
        """Has the annotation, for the one function of Python's that evaluates them."""

    holder.__annotations__ = {"it": annotation}
    return typing.get_type_hints(holder, names, local, include_extras=True)["it"]


def _namespace(function: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The global names that a function sees, and those of the functions around it.

    A name that only an annotation uses is no part of a function's closure. While the function around it still runs, as
    it does when a handler is registered beside its model, the name is among that one's local variables.
    """
    while isinstance(function, functools.partial):
        function = function.func
    if not inspect.isroutine(function) and not inspect.isclass(function):
        function = type(function).__call__
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    if code is None:
        return {}, {}
    local: dict[str, Any] = {}
    frame, sought = sys._getframe(), code
    for _ in range(_MAX_FRAMES):
        if frame.f_back is None:
            break
        frame = frame.f_back
        if sought in frame.f_code.co_consts:
            if frame.f_code.co_name != "<module>":
                local = {**frame.f_locals, **local}
            sought = frame.f_code
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=False):
        with contextlib.suppress(ValueError):  # an empty cell
            local[name] = cell.cell_contents
    return function.__globals__, local


def _is_plain_class(annotation: object) -> bool:
    """Whether an annotation is a class, and not a generic such as `list[int]`, which Python 3.10 also calls a class."""
    return inspect.isclass(annotation) and typing.get_origin(annotation) is None
