"""Tests of the page about troubleshooting: its quotes match the package."""

from __future__ import annotations

import logging
import re
import sys

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from fastapi_ws_stabilizer import (
    InvalidTokenError,
    ManagerNotFoundError,
    StableSocketDep,
    TokenExpiredError,
    WebSocketConnectionManager,
)
from fastapi_ws_stabilizer.close_codes import CLOSE_POLICIES
from fastapi_ws_stabilizer.errors import _TOKEN_PROBLEMS
from fastapi_ws_stabilizer.servers.detect import websocket_library_advice
from tests.docs.deadline import within
from tests.docs.pages import ROOT, blocks, prose

PAGE = ROOT / "docs/how-to/troubleshooting.md"
QUOTED = [line for block in blocks("text") if block.page == PAGE for line in block.code.splitlines()]
SOURCE = "\n".join(path.read_text() for path in (ROOT / "fastapi_ws_stabilizer").rglob("*.py"))


def test_quoted_log_lines_are_those_of_the_package(caplog: pytest.LogCaptureFixture) -> None:
    """The log lines for a wrong path and for a foreign origin are as on the page."""
    manager = WebSocketConnectionManager()
    app = FastAPI(lifespan=manager.lifespan)

    @app.websocket("/ws/{client_id}")
    async def endpoint(ws: StableSocketDep) -> None:
        await ws.run()

    def dial() -> None:
        with TestClient(app) as client:
            for path, headers in (("/sw/ann", {}), ("/ws/ann", {"origin": "https://other.example"})):
                with pytest.raises(Exception), client.websocket_connect(path, headers=headers):  # noqa: B017, PT011
                    pass

    with caplog.at_level(logging.WARNING):
        within(10.0, dial)
    logged = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert logged == [line for line in QUOTED if line.startswith(("no_websocket_route", "connection_refused"))]


def test_quoted_errors_are_those_of_the_package() -> None:
    """Each error is quoted as a program prints it, and no other line is."""
    errors = [str(ManagerNotFoundError()), str(TokenExpiredError())]
    errors += [str(InvalidTokenError(problem)) for problem in _TOKEN_PROBLEMS]
    assert sorted(errors) == sorted(line for line in QUOTED if not re.match(r"\w+_\w+ \w+=", line))


def test_quoted_close_reasons_are_those_of_the_package() -> None:
    """Each close reason in a table is one that the package sends."""
    rows = re.findall(r"^\| (?:\d{4} \| )?`([a-z]+ [^`_=]*)`", PAGE.read_text(), flags=re.MULTILINE)
    reasons = {policy.reason for policy in CLOSE_POLICIES.values()}
    assert rows
    for row in rows:
        start = row.partition("...")[0].rstrip("; ").partition("; retry")[0]
        assert row in reasons or f'"{start}' in SOURCE, row


def test_named_events_exist() -> None:
    """Each event and cause on the page exists in the package."""
    named = set(re.findall(r"`([a-z]+_[a-z_]+)`", prose(PAGE)))
    assert {name for name in named if not re.search(rf"\b{name}\b", SOURCE)} == set()


def test_fix_for_a_missing_library_is_that_of_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """The install command on the page is the one that the log names."""
    monkeypatch.setitem(sys.modules, "uvicorn", logging)
    monkeypatch.setattr("fastapi_ws_stabilizer.servers.detect.importlib.util.find_spec", lambda _: None)
    problem = websocket_library_advice()
    assert problem is not None
    assert re.search(r'pip install "[^"]+"', problem).group() in PAGE.read_text()  # type: ignore[union-attr]
