"""Whether an endpoint runs under Starlette's TestClient, which raises the errors of the endpoint in the test."""

from __future__ import annotations

import sys
from typing import Final

_RUNNERS: Final = frozenset({"_run", "run_app"})
"""Functions of the session that run the application: the method, and on Starlette 0.37 a function within it."""


def raises_server_exceptions() -> bool:
    """Whether the current task serves a TestClient, and `raise_server_exceptions` is not switched off.

    The ASGI scope does not show the TestClient, so this searches the call stack for its session, which runs the
    endpoint in one of its methods.
    """
    session_kind = getattr(sys.modules.get("starlette.testclient"), "WebSocketTestSession", None)
    if session_kind is None:  # no test has imported it
        return False
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name not in _RUNNERS:
            continue
        session = frame.f_locals.get("self")
        if isinstance(session, session_kind):
            client = getattr(getattr(session, "portal_factory", None), "__self__", None)
            return bool(getattr(getattr(client, "_transport", None), "raise_server_exceptions", True))
    return False
