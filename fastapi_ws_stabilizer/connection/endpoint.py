"""The user's code behind one connection: the task it runs in, how it is told to stop, and how its end is read."""

from __future__ import annotations

import asyncio
import sys
import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager, AsyncExitStack
from typing import Any, Final

from fastapi import WebSocketDisconnect
from fastapi.exceptions import WebSocketRequestValidationError
from pydantic_core import to_json
from starlette.exceptions import HTTPException, WebSocketException  # FastAPI's own are subclasses of these

from fastapi_ws_stabilizer.close_codes import (
    MAX_REASON_BYTES,
    CloseInfo,
    DisconnectReason,
    check_close_code,
    local_close,
    truncate_reason,
)
from fastapi_ws_stabilizer.errors import WebSocketStabilizerError
from fastapi_ws_stabilizer.tasks import LazyEvent

_CANCEL_MESSAGE: Final = "the connection is over and its disconnect_grace has passed"

_EXIT_STACK_KEYS: Final = ("fastapi_function_astack", "fastapi_inner_astack", "fastapi_astack")
"""Where FastAPI keeps the exit stacks of a connection, the one that closes first comes first. The names have changed
over its versions; where none is found, only the refinement that it serves is missing."""


class _Busy:
    """User code at work for the length of a block. Not a generator, because each endpoint that runs holds one."""

    __slots__ = ("_endpoint",)

    def __init__(self, endpoint: EndpointTask) -> None:
        self._endpoint = endpoint

    def __enter__(self) -> None:
        self._endpoint._running += 1

    def __exit__(self, *_: object) -> None:
        self._endpoint._on_work_done()


class EndpointTask(LazyEvent):
    """The task that serves one connection, and what user code does for it elsewhere.

    It is itself the latch that is set when its user code has ended: one object less for each idle connection.

    Attributes:
        tracked: Whether we are told when the user's code ends.
    """

    __slots__ = ("_cancelled", "_idle", "_running", "_task", "tracked")

    def __init__(self, *, cancellable: bool) -> None:
        super().__init__()
        task = asyncio.current_task() if cancellable else None
        # Weakly: what a task has opened is remembered under the task, and must not keep it alive.
        self._task = None if task is None else weakref.ref(task)
        self._cancelled = False
        self.tracked = cancellable
        self._running = 0
        self._idle: asyncio.Future[None] | None = None
        if not cancellable:
            self.mark_returned()  # nobody would tell us when it does

    def mark_returned(self) -> None:
        """Note that the user's code has ended."""
        self.set()

    @property
    def has_ended(self) -> bool:
        """Whether the user's code has ended.

        FastAPI then closes its dependencies in the same task, and that must not be cancelled.
        """
        return self.is_set

    @property
    def is_running(self) -> bool:
        """Whether the user's code has not ended, or is at work on what the connection has received."""
        return not self.is_set or self._running > 0

    @property
    def returned(self) -> asyncio.Future[None]:
        """A future that is done when the user's code has ended."""
        return self.future

    def running(self) -> AbstractContextManager[None]:
        """Note, for the length of a block, that user code is at work on what the connection has received."""
        return _Busy(self)

    def wait_idle(self) -> asyncio.Future[None]:
        """A future that is done as soon as nobody is at work. The disconnect hooks wait for that."""
        self._idle = asyncio.get_running_loop().create_future()
        if not self._running:
            self._idle.set_result(None)
        return self._idle

    def _on_work_done(self) -> None:
        self._running -= 1
        if not self._running and self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    def watch(self, scope: Mapping[str, Any]) -> None:
        """Learn from FastAPI when the user's code ends, before its dependencies are closed.

        What was pushed last on an exit stack runs first, so this is called once when the connection opens and once more
        when it ends: then it stands above the dependencies that have been entered in between.
        """
        stack = find_exit_stack(scope)
        if stack is not None:
            stack.push(self._on_exit)  # less memory than a callback, which is a closure

    def _on_exit(self, *_: object) -> None:
        self.mark_returned()

    def cancel(self) -> bool:
        """Cancel the task, once, unless the user's code has ended; tell whether that was done now."""
        task = None if self._task is None else self._task()
        if task is None or self._cancelled or self.has_ended:
            return False
        self._cancelled = True
        task.cancel(_CANCEL_MESSAGE)
        return True

    @property
    def task(self) -> asyncio.Task[Any] | None:
        """The task that serves the connection, while it runs."""
        return None if self._task is None else self._task()

    @property
    def has_swallowed_cancellation(self) -> bool:
        """Whether the current task is the endpoint's, and goes on after it was cancelled."""
        return self._cancelled and not self.has_ended and self.task is asyncio.current_task()

    def is_cancelled_by_others(self, error: BaseException) -> bool:
        """Whether `error` is a cancellation of this task that did not come from `cancel`.

        A `CancelledError` of another task that user code has awaited is none: it is a bug like any other exception.
        Python 3.10 cannot tell the two apart.
        """
        task = None if self._task is None else self._task()
        if not isinstance(error, asyncio.CancelledError) or task is None:
            return isinstance(error, asyncio.CancelledError)
        return sys.version_info < (3, 11) or task.cancelling() > 0

    def is_own_cancellation(self, error: BaseException) -> bool:
        """Whether `error` is the cancellation that `cancel` has sent, and no other is under way.

        Where it is, the task's count of cancellations is put right, so that the caller may swallow it.
        """
        task = None if self._task is None else self._task()
        if not self._cancelled or task is None or not isinstance(error, asyncio.CancelledError):
            return False
        if sys.version_info >= (3, 11):
            return task.uncancel() == 0
        return not error.args or error.args[0] == _CANCEL_MESSAGE


_EXPECTED_ERRORS: Final = (
    HTTPException,
    WebSocketException,
    WebSocketDisconnect,  # SocketClosed is one
    WebSocketRequestValidationError,
    asyncio.CancelledError,
)


def find_exit_stack(scope: Mapping[str, Any]) -> AsyncExitStack | None:
    """The exit stack that FastAPI closes first when the endpoint of this connection ends."""
    for name in _EXIT_STACK_KEYS:
        stack = scope.get(name)
        if isinstance(stack, AsyncExitStack):
            return stack
    return None


def root_cause(error: BaseException) -> BaseException:
    """The exception that decides how a connection ends: of a group, a bug before a refusal before a disconnect."""
    inside = getattr(error, "exceptions", None)
    if not isinstance(inside, (tuple, list)) or not inside:
        return error
    causes = [root_cause(one) for one in inside]
    return min(
        causes, key=lambda one: (not is_bug(one), isinstance(one, (WebSocketDisconnect, asyncio.CancelledError)))
    )


def is_bug(error: BaseException) -> bool:
    """Whether an exception that an endpoint let escape is one that somebody has to mend."""
    error = root_cause(error)
    if isinstance(error, _EXPECTED_ERRORS):
        return False
    return not isinstance(error, WebSocketStabilizerError) or error.close_code == WebSocketStabilizerError.close_code


def close_info_for(error: BaseException | None) -> CloseInfo:
    """How a connection ends whose endpoint returned (`None`) or let `error` escape."""
    error = None if error is None else root_cause(error)
    if error is None or isinstance(error, WebSocketDisconnect):
        return local_close(DisconnectReason.COMPLETED)
    if isinstance(error, HTTPException):
        return local_close(
            DisconnectReason.POLICY, code=_sendable(4000 + error.status_code), text=_text(error) + _hint(error)
        )
    if isinstance(error, WebSocketException):
        return local_close(DisconnectReason.POLICY, code=_sendable(error.code), text=error.reason)
    if isinstance(error, WebSocketRequestValidationError):
        return local_close(DisconnectReason.POLICY, text=_validation_text(error))
    if isinstance(error, WebSocketStabilizerError) and not is_bug(error):
        return local_close(DisconnectReason.POLICY, code=_sendable(error.close_code), text=error.close_text)
    if isinstance(error, asyncio.CancelledError):
        return local_close(DisconnectReason.SERVER_SHUTDOWN)
    return local_close(DisconnectReason.ERROR)


def _sendable(code: int) -> int:
    try:
        return check_close_code(code)
    except ValueError:
        return 1008


def _text(error: HTTPException) -> str:
    detail: object = error.detail
    return detail if isinstance(detail, str) else to_json(detail, fallback=str).decode("utf-8")


def _hint(error: HTTPException) -> str:
    """When to come back, as clients of this library read it: the `Retry-After` of an answer that cannot have one."""
    wait = str((error.headers or {}).get("Retry-After", ""))
    return f"; retry={int(wait) * 1000}" if wait.isascii() and wait.isdigit() and len(wait) < 5 else ""


def _validation_text(error: WebSocketRequestValidationError) -> str:
    """Say as JSON which parameters are wrong; as many as fit whole into a close reason."""
    problems: list[dict[str, str]] = []
    text = ""
    for problem in error.errors():
        problems.append({"loc": ".".join(map(str, problem.get("loc", ()))), "msg": str(problem.get("msg", ""))})
        longer = to_json(problems).decode("utf-8")
        if len(longer.encode()) > MAX_REASON_BYTES:
            return text or truncate_reason(f"invalid: {problems[0]['loc']}")
        text = longer
    return text
