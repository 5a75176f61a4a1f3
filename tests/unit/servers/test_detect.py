"""Tests of the check for WebSocket support in the server."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest

from fastapi_ws_stabilizer.servers.detect import websocket_library_advice


def pretend(monkeypatch: pytest.MonkeyPatch, *, uvicorn: bool, installed: set[str]) -> None:
    """Make the process look as if it had this server and these libraries."""
    if uvicorn:
        monkeypatch.setitem(sys.modules, "uvicorn", ModuleType("uvicorn"))
    else:
        monkeypatch.delitem(sys.modules, "uvicorn", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in installed else None)


@pytest.mark.parametrize("library", ["websockets", "wsproto"])
def test_uvicorn_with_either_websocket_library_is_accepted(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    """Either of the two libraries is sufficient."""
    pretend(monkeypatch, uvicorn=True, installed={library})
    assert websocket_library_advice() is None


def test_uvicorn_without_websocket_library_names_pip_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where uvicorn would answer every handshake with 404, the error names the `pip install` command."""
    pretend(monkeypatch, uvicorn=True, installed=set())
    problem = websocket_library_advice()
    assert problem is not None
    assert 'pip install "fastapi-ws-stabilizer[uvicorn]"' in problem


def test_other_server_is_not_checked_for_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without uvicorn in the process no library is required."""
    pretend(monkeypatch, uvicorn=False, installed=set())
    assert websocket_library_advice() is None
