"""Signatures of registered functions, checked at registration.

An unsuitable function raises at its registration instead of at the first message. The error names the file and line of
the function and says what to write.
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
from typing_extensions import is_protocol

from fastapi_ws_stabilizer.room import Room
from fastapi_ws_stabilizer.socket import StableSocket

_MAX_WRAPPERS: Final = 32
"""Maximum number of decorators that are unwrapped."""

_MAX_FRAMES: Final = 64
"""Maximum number of stack frames in which the function around a handler is searched."""

_EMPTY: Final = inspect.Parameter.empty
_POSITIONAL: Final = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_MARKERS: Final = (params.Depends, params.Param, params.Body)

_PARAMETERS: Final = {
    "the socket": "ws: StableSocket",
    "the message": "message: YourModel",
    "the reason": "reason: DisconnectReason",
    "a ResumeOutcome": "outcome: ResumeOutcome",
    "the credential": "credential: str | None",
    "the error": "error: BaseException",
    "a SlowConsumer": "how: SlowConsumer",
    "the room": "room: Room",
    "a Presence": "presence: Presence",
}
"""Arguments that a function can get, and the parameter to write for each."""

_FIRST_TYPES: Final[Mapping[str, type]] = {"the socket": StableSocket, "the room": Room}
"""Types of the first argument."""

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
"""Names by which an unannotated parameter is recognised as the second one."""

_SOCKET_NAMES: Final = frozenset({"ws", "socket", "websocket", "sock"})
_NAMES: Final[Mapping[str, frozenset[str]]] = {"the socket": _SOCKET_NAMES, "the room": frozenset({"room"})}
"""Names by which an unannotated parameter is recognised as the first one."""

_OTHER_NAMES: Final[Mapping[str, frozenset[str]]] = {
    "the socket": _SECOND_NAMES,
    "the room": _SECOND_NAMES | _SOCKET_NAMES | {"who", "presence", "member"},
}
"""Names by which an unannotated parameter is recognised as not the first one."""

_ALTERNATIVES: Final[tuple[tuple[tuple[type, ...], str], ...]] = (
    ((HTTPConnection,), "use ws.websocket, Starlette's WebSocket of the connection"),
    ((BackgroundTasks, StarletteBackgroundTasks), "start the work with ws.create_task(...)"),
    ((Response,), "set headers of the handshake answer in ws.accept_headers, in an on_handshake function"),
    ((SecurityScopes,), "read scopes in the dependency of manager.socket_for(...)"),
)
"""Types that FastAPI passes to endpoints only, and the alternative for a registered function."""

_NO_DEPENDENCIES: Final = (
    "FastAPI resolves that for endpoints only. Create what you need in the function itself, or in a decorator with "
    "functools.wraps that passes it on"
)


class Signature:
    """Checked parameters of one function at its registration.

    For a decorator with `functools.wraps` its own parameters count, because the decorator is called. If it takes any
    number of arguments (`*args`), the parameters of the wrapped function count.

    Args:
        function: The function.
        event: The decorator that registers it, such as `on_message`.
        shape: Descriptions of its arguments, in order.

    Attributes:
        arguments: The number of arguments that it is called with.

    Raises:
        TypeError: The function cannot be called with them. The error names the function, its file and line, and what
            to write.
    """

    __slots__ = ("_chain", "_event", "_function", "_offset", "_shape", "_source", "arguments")

    def __init__(self, function: Callable[..., Any], event: str, shape: Sequence[str]) -> None:
        self._function = function
        self._event = event
        self._shape = shape
        if not callable(function):
            raise TypeError(f"{event} takes a function, not {function!r}: write @manager.{event} above a function")
        if _yields(function):
            raise self._error(
                "return instead, and send with ws.send(...)", "contains `yield`, so calling it would not run it"
            )
        self._chain = list(_chain(function))
        self._check_fastapi_parameters()
        self._check_keywords()
        self._source, self._offset, self.arguments = self._find_arguments()
        if self._source is not None:
            self._check_order(self._source)

    @property
    def message_annotation(self) -> Any:
        """The evaluated annotation of the second parameter, or `Parameter.empty` if it has none.

        Raises:
            TypeError: The annotation cannot be evaluated.
        """
        annotation = self._raw_annotation()
        if annotation is _EMPTY:
            return _EMPTY
        try:
            return self._evaluated(annotation)
        except Exception as error:
            raise self.cannot_be_read(annotation, error) from error

    def cannot_be_read(self, annotation: Any, error: Exception) -> TypeError:
        """Return the error for a function with an unsuitable annotation of its message."""
        shown = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", repr(annotation))
        if isinstance(error, NameError):
            return self._error(
                f"the annotation of its message, {shown!r}, cannot be evaluated ({error}): import that name at run "
                "time, outside `if TYPE_CHECKING:`, or define it at module level"
            )
        first_line = str(error).strip().split("\n", 1)[0]
        return self._error(
            f"its message cannot be {shown!r} ({first_line}): annotate it with a pydantic model, dict, str, bytes, or "
            "another type that pydantic validates"
        )

    # ── the checks ──

    def _error(self, problem: str, rule: str = "") -> TypeError:
        rule = rule or f"must take {_in_words(self._shape)}"
        return TypeError(f"{describe(self._function)} cannot be an {self._event} function: it {rule}; {problem}")

    @property
    def _advice(self) -> str:
        return f"write {_name(self._function)}({', '.join(_PARAMETERS[word] for word in self._shape)})"

    def _check_fastapi_parameters(self) -> None:
        """Reject parameters for which only FastAPI has a value.

        A decorator with its own parameters may pass the inner function values for its annotated parameters. A default
        such as `Depends(...)` is rejected there too, because the function would get the default itself if nothing is
        passed.
        """
        given = False
        for function, parameters in self._chain:
            first = True
            for parameter in parameters:
                annotation = self._evaluated_or_none(parameter.annotation)
                is_first, first = first, False
                marker = _marker(parameter.default) or (None if given else _marker(annotation))
                if marker is not None and not (is_first and self._is_first_type(annotation)):
                    raise TypeError(
                        f"{describe(function)} cannot be an {self._event} function: its parameter {parameter.name!r} "
                        f"is {type(marker).__name__}(...). {_NO_DEPENDENCIES}"
                    )
                for kinds, advice in _ALTERNATIVES:
                    if not given and _is_plain_class(annotation) and issubclass(annotation, kinds):
                        raise TypeError(
                            f"{describe(function)} cannot be an {self._event} function: its parameter "
                            f"{parameter.name!r} is a {annotation.__name__}, which FastAPI passes to endpoints only: "
                            f"{advice}; {self._advice}"
                        )
            given = given or not _takes_any_number(parameters)

    def _check_keywords(self) -> None:
        parameters = self._chain[0][1]
        for parameter in parameters:
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY and parameter.default is _EMPTY:
                raise self._error(f"it needs the keyword argument {parameter.name!r}, which the library does not pass")
        if parameters and all(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            raise self._error(
                f"**{parameters[0].name} takes keyword arguments, which the library does not pass: {self._advice}"
            )

    def _find_arguments(self) -> tuple[list[inspect.Parameter] | None, int, int]:
        """Return the parameters that count, the index of the first argument, and the number of arguments."""
        max_arguments = len(self._shape)
        for depth, (_, parameters) in enumerate(self._chain):
            if _takes_any_number(parameters):
                continue
            positional = [parameter for parameter in parameters if parameter.kind in _POSITIONAL]
            if depth == 0:
                needed = [parameter for parameter in positional if parameter.default is _EMPTY]
                if len(needed) > max_arguments:
                    more = ", ".join(repr(parameter.name) for parameter in needed[max_arguments:])
                    raise self._error(f"the library does not pass {more}: {self._advice}")
                return positional, 0, min(max_arguments, len(positional))
            offset = self._index_of_first(positional) or 0
            return positional, offset, min(max_arguments, len(positional) - offset)
        return None, 0, max_arguments

    def _check_order(self, positional: list[inspect.Parameter]) -> None:
        """Reject a function with a first parameter that is neither the socket nor the room."""
        if not positional:
            return
        first = positional[self._offset]
        if first.name in ("self", "cls") and first.annotation is _EMPTY:
            raise self._error(f"{first.name!r} is not bound: register the bound method of an object; {self._advice}")
        annotation = self._evaluated_or_none(first.annotation)
        fits = None if annotation is _EMPTY else _can_be(annotation, self._first_type)
        index = self._index_of_first(positional)
        if fits is False or (fits is None and (index or 0) > self._offset):
            raise self._error(f"its first parameter, {first.name!r}, is not {self._shape[0]}: {self._advice}")
        if fits is not None or self._names_first(first.annotation):
            return
        argument = self._shape[0]
        if first.name in _OTHER_NAMES[argument]:
            raise self._error(f"its first parameter is called {first.name!r} but gets {argument}: {self._advice}")
        # A decorator with *args may pass other arguments first.
        if first.name in _NAMES[argument] or _takes_any_number(self._chain[0][1]):
            return
        for later in positional[1:]:
            if later.name in _NAMES[argument] and later.annotation is _EMPTY:
                raise self._error(
                    f"its first parameter, {first.name!r}, gets {argument}, but a later one is called {later.name!r}: "
                    f"{self._advice}"
                )

    # ── reading annotations ──

    @property
    def _first_type(self) -> type:
        return _FIRST_TYPES[self._shape[0]]

    def _is_first_type(self, annotation: Any) -> bool:
        return _can_be(annotation, self._first_type) is True

    def _names_first(self, annotation: Any) -> bool:
        """Return whether an annotation that cannot be evaluated contains the name of the first argument's type."""
        return isinstance(annotation, str) and self._first_type.__name__ in annotation

    def _index_of_first(self, parameters: list[inspect.Parameter]) -> int | None:
        """Return the index of the parameter that is annotated as the socket or the room, or `None`."""
        for number, parameter in enumerate(parameters):
            if self._is_first_type(self._evaluated_or_none(parameter.annotation)):
                return number
            if self._names_first(parameter.annotation):
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
                index = (self._index_of_first(positional) or 0) + 1
                named = positional[index : index + 1]
            if named and named[0].annotation is not _EMPTY:
                return named[0].annotation
        return parameter.annotation

    def _evaluated_or_none(self, annotation: Any) -> Any:
        """Return the evaluated annotation, or `None` if it cannot be evaluated."""
        try:
            return self._evaluated(annotation)
        except Exception:
            return None

    def _evaluated(self, annotation: Any) -> Any:
        """Return an annotation with all its names resolved.

        Raises:
            Exception: The annotation cannot be evaluated. Most often this is a `NameError`.
        """
        problems: list[Exception] = []
        for function, _ in reversed(self._chain):  # functools.wraps copies the annotations of the innermost function
            names, local = _namespace(function)
            try:
                return _hint(annotation, names, local)
            except Exception as error:
                problems.append(error)
        raise problems[0]


def describe(function: Any) -> str:
    """Return the name, file and line of a function, such as `say (/srv/app.py:12)`."""
    code = getattr(_innermost(function), "__code__", None)
    name = _name(function)
    return name if code is None else f"{name} ({code.co_filename}:{code.co_firstlineno})"


def is_async(function: Callable[..., Any]) -> bool:
    """Return whether calling `function` returns a coroutine, also for partials and objects with `async __call__`."""
    return _has(function, inspect.iscoroutinefunction)


def _has(function: Any, kind: Callable[[Any], bool]) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return kind(function) or kind(getattr(function, "__call__", None))  # noqa: B004 (the method itself is inspected)


def _yields(function: Any) -> bool:
    """Return whether calling a function does not run its code, as for a generator or a `contextlib` context manager."""
    if _has(function, inspect.isasyncgenfunction) or _has(function, inspect.isgeneratorfunction):
        return True
    code = getattr(function, "__code__", None)
    return isinstance(code, types.CodeType) and code.co_filename == contextlib.__file__


def _in_words(shape: Sequence[str]) -> str:
    return f"{shape[0]}, and optionally {shape[1]}" if len(shape) > 1 else shape[0]


def _name(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__qualname__", None)
    return name if isinstance(name, str) else type(function).__qualname__


def _innermost(function: Any) -> Any:
    """Return the innermost function behind partials, decorators and objects with `__call__`."""
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
    """Return the callable that a decorator wraps according to `__wrapped__`, or `None`."""
    wrapped = getattr(function, "__wrapped__", None)
    return wrapped if callable(wrapped) else None


def _chain(function: Any) -> Iterator[tuple[Any, list[inspect.Parameter]]]:
    """Yield a function and the functions that it wraps, the outermost first, each with its own parameters."""
    for _ in range(_MAX_WRAPPERS):
        try:
            signature = inspect.signature(function, follow_wrapped=False)
        except (ValueError, TypeError):  # a C function without a signature, or a partial of another object
            yield function, [inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)]
        else:
            yield function, list(signature.parameters.values())
        function = _inner_function(function)
        if function is None:
            return


def _inner_function(function: Any) -> Any:
    """Return the function that a function wraps, bound in the same manner.

    It is `None` if the function wraps nothing or has a `__signature__`.
    """
    if getattr(function, "__signature__", None) is not None:
        return None
    if isinstance(function, functools.partial):
        inner = _inner_function(function.func)
        return None if inner is None else functools.partial(inner, *function.args, **function.keywords)
    if inspect.ismethod(function):
        inner = _inner_function(function.__func__)
        return None if inner is None else types.MethodType(inner, function.__self__)
    if (wrapped := _wrapped(function)) is not None:
        return wrapped
    if inspect.isroutine(function) or inspect.isclass(function):
        return None
    return _inner_function(function.__call__) if inspect.ismethod(function.__call__) else None


def _takes_any_number(parameters: list[inspect.Parameter]) -> bool:
    return any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters)


def _marker(value: Any) -> Any:
    """Return the `Depends`, `Header` or similar marker of FastAPI in a default or an annotation, or `None`."""
    if isinstance(value, _MARKERS):
        return value
    if typing.get_origin(value) is Annotated:
        return next((one for one in value.__metadata__ if isinstance(one, _MARKERS)), None)
    return None


def _can_be(annotation: Any, wanted: type) -> bool | None:
    """Return whether an object of a class fits an annotation, or `None` if that is unknown."""
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
        if is_protocol(annotation):
            return None
        return issubclass(wanted, annotation) or issubclass(annotation, wanted)
    return None if origin is None else False


def _hint(annotation: Any, names: dict[str, Any], local: dict[str, Any]) -> Any:
    """Evaluate an annotation, including strings within it."""

    def holder() -> None:
        """Carry the annotation, because `typing.get_type_hints` takes a function."""

    holder.__annotations__ = {"it": annotation}
    return typing.get_type_hints(holder, names, local, include_extras=True)["it"]


def _namespace(function: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the global names that a function sees, and the local names of the functions around it.

    A name that only an annotation uses is not part of the closure. While the outer function still runs, as it does when
    it defines both a handler and its model, the name is one of its local variables.
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
    """Return whether an annotation is a class.

    A generic such as `list[int]`, which Python 3.10 also reports as a class, does not count.
    """
    return inspect.isclass(annotation) and typing.get_origin(annotation) is None
