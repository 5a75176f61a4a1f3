"""Tests of the types that a reader's type checker sees in the code of the pages."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, blocks

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed; `make test` does it"),
]

FRAGMENT = """\
# mypy: disable-error-code="name-defined, no-any-return, untyped-decorator"
from fastapi import Depends, FastAPI
from pydantic import BaseModel
from fastapi_ws_stabilizer import *

app: FastAPI
manager: WebSocketConnectionManager


async def fragment(ws: StableSocket) -> None:
"""
"""What stands before a fragment. Names that it takes from the text around it are not known."""

OPTIONS = """\
from fastapi_ws_stabilizer import DuplicatePolicy, WebSocketConfig

config = WebSocketConfig(
    heartbeat_type="custom",
    reject="http",
    on_duplicate="allow",
    inbox_overflow="close",
    outbox_overflow="drop_oldest",
    compression="none",
    memory_eviction_policy="fifo",
)
other = WebSocketConfig(on_duplicate=DuplicatePolicy.ALLOW)
"""

WRONG = """\
from fastapi_ws_stabilizer import StableSocketDep, WebSocketConfig, WebSocketConnectionManager

WebSocketConfig(on_duplicate="nonsense")
manager = WebSocketConnectionManager()
manager.kick


async def endpoint(ws: StableSocketDep) -> None:
    ws.accept
    manager.room("lobby").broadcast
"""


def check(folder: Path) -> str:
    """What mypy says of all modules in a folder."""
    answer = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--config-file", os.devnull),
            *(
                "--disable-error-code",
                "import-untyped",
                "--allow-subclassing-any",
            ),  # packages without types of their own
            *("--cache-dir", str(folder / "cache"), *(path.name for path in sorted(folder.glob("*.py")))),
        ],
        cwd=folder,
        env={**os.environ, "MYPYPATH": str(ROOT), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    return "".join(line for line in answer.stdout.splitlines(keepends=True) if ": note:" not in line) + (
        answer.stderr if answer.returncode > 1 else ""
    )


def test_code_of_the_pages_passes_strict_mypy(tmp_path: Path) -> None:
    """Every Python block type-checks, and an option of an enumeration can be given by its value."""
    for block in blocks("python"):
        code = block.module if block.complete else FRAGMENT + textwrap.indent(block.code, "    ")
        (tmp_path / (re.sub(r"\W", "_", str(block)) + ".py")).write_text(code)
    (tmp_path / "options.py").write_text(OPTIONS)
    assert check(tmp_path) == ""


def test_wrong_names_and_values_fail_mypy(tmp_path: Path) -> None:
    """A type checker finds a value that is no member, and a name that is not there."""
    (tmp_path / "wrong.py").write_text(WRONG)
    told = check(tmp_path)
    assert [line.partition(" error: ")[0] for line in told.splitlines()] == [f"wrong.py:{n}:" for n in (3, 5, 9, 10)]
