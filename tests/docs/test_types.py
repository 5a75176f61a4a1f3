"""Tests of the types that a user's type checker sees: in the code of the pages, and in the public API."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

import fastapi_ws_stabilizer
from fastapi_ws_stabilizer import WebSocketConnectionManager
from tests.docs.pages import ROOT, blocks

pytestmark = pytest.mark.timeout(180)

needs_mypy = pytest.mark.skipif(
    importlib.util.find_spec("mypy") is None, reason="mypy is not installed; `make test` does it"
)
needs_pyright = pytest.mark.skipif(
    importlib.util.find_spec("pyright") is None, reason="pyright is not installed; `make test` does it"
)

PACKAGE = fastapi_ws_stabilizer.__name__
PUBLIC_MODULES = (PACKAGE, f"{PACKAGE}.client", f"{PACKAGE}.auth", f"{PACKAGE}.platforms")

FRAGMENT = """\
# mypy: disable-error-code="name-defined, no-any-return, untyped-decorator"
# pyright: reportUndefinedVariable=false, reportWildcardImportFromLibrary=false
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, Request, Response, WebSocket, WebSocketDisconnect
from pydantic import BaseModel
from fastapi_ws_stabilizer import *
from fastapi_ws_stabilizer.client import *
from fastapi_ws_stabilizer.auth import *

app: FastAPI
client: Client
client_id: str
manager: WebSocketConnectionManager
user_id: str
websocket: WebSocket


async def fragment(ws: StableSocket) -> None:
"""
"""Code before a fragment. Other names that the fragment takes from its context are undefined."""

OPTIONS = """\
from fastapi_ws_stabilizer import DuplicatePolicy, WebSocketConfig

config = WebSocketConfig(
    heartbeat_type="custom",
    heartbeat_payload={"type": "ping"},
    reject="http",
    on_duplicate="allow",
    inbox_overflow="close",
    outbox_overflow="drop_oldest",
    compression="none",
    memory_eviction_policy="fifo",
)
other = WebSocketConfig(on_duplicate=DuplicatePolicy.ALLOW)
same: bool = config.on_duplicate is DuplicatePolicy.ALLOW
policy: DuplicatePolicy = DuplicatePolicy(config.on_duplicate)
"""

DECORATED = """\
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi_ws_stabilizer import StableSocket, WebSocketConnectionManager

manager = WebSocketConnectionManager()


@manager.on_connect
async def plain(ws: StableSocket) -> int:
    return 1


@manager.on_disconnect()
def with_parentheses(ws: StableSocket) -> str:
    return ""


@manager.on_message
async def untyped(ws: StableSocket, message: dict[str, int]) -> None: ...


@manager.on_message("chat", max_rate=3)
async def typed(ws: StableSocket, message: dict[str, int]) -> None: ...


first: Callable[[StableSocket], Coroutine[Any, Any, int]] = plain
second: Callable[[StableSocket], str] = with_parentheses
third: Callable[[StableSocket, dict[str, int]], Coroutine[Any, Any, None]] = untyped
fourth: Callable[[StableSocket, dict[str, int]], Coroutine[Any, Any, None]] = typed
"""
"""Functions whose type a decorator must keep."""

WRONG = """\
from fastapi_ws_stabilizer import StableSocketDep, WebSocketConfig, WebSocketConnectionManager

WebSocketConfig(on_duplicate="nonsense")
manager = WebSocketConnectionManager()
manager.kick


async def endpoint(ws: StableSocketDep) -> None:
    ws.accept
    manager.room("lobby").broadcast


manager.on_connect(3)


@manager.on_connect
async def hook(ws: StableSocketDep) -> int:
    return 1


text: str = hook
"""
WRONG_LINES = [3, 5, 9, 10, 13, 21]

PLUGIN = """\
[mypy]
plugins = pydantic.mypy
[pydantic-mypy]
init_typed = True
"""


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a tool in a folder, with the package under test and the interpreter of the tests."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env={**os.environ, "PATH": path, "MYPYPATH": str(ROOT), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )


def mypy(folder: Path, config: str = os.devnull) -> list[str]:
    """Return the errors of `mypy --strict` in all modules of a folder."""
    answer = run(
        folder,
        *("mypy", "--strict", "--no-error-summary", "--config-file", config),
        *("--disable-error-code", "import-untyped", "--allow-subclassing-any"),  # packages without types
        *("--cache-dir", str(folder.with_name("cache")), *(path.name for path in sorted(folder.glob("*.py")))),
    )
    assert answer.returncode < 2, answer.stderr
    return [line for line in answer.stdout.splitlines() if ": note:" not in line]


def pyright(folder: Path) -> list[str]:
    """Return the errors of pyright in all modules of a folder."""
    answer = run(folder, "pyright", "--outputjson", "--pythonpath", sys.executable, ".")
    assert answer.returncode < 2, answer.stdout + answer.stderr
    return [
        f"{Path(found['file']).name}:{found['range']['start']['line'] + 1}: {found['severity']}: {found['message']}"
        for found in json.loads(answer.stdout)["generalDiagnostics"]
        if found["severity"] == "error"
    ]


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a module for each Python block, with options, with decorators, and one with mistakes."""
    folder = tmp_path_factory.mktemp("types") / "modules"
    folder.mkdir()
    for block in blocks("python"):
        code = block.module if block.complete else FRAGMENT + textwrap.indent(block.code, "    ")
        (folder / (re.sub(r"\W", "_", str(block)) + ".py")).write_text(code)
    (folder / "options.py").write_text(OPTIONS)
    (folder / "decorated.py").write_text(DECORATED)
    (folder / "wrong.py").write_text(WRONG)
    return folder


@pytest.fixture(scope="module")
def mypy_errors(modules: Path) -> list[str]:
    """Return the findings of mypy; one run for all tests, because a run takes seconds."""
    return mypy(modules)


@pytest.fixture(scope="module")
def pyright_errors(modules: Path) -> list[str]:
    """Return the findings of pyright; one run for all tests, because a run takes seconds."""
    return pyright(modules)


def is_expected(error: str) -> bool:
    """Return whether the error is in the module with mistakes."""
    return error.startswith("wrong.py:")


@needs_mypy
def test_page_code_passes_strict_mypy(mypy_errors: list[str]) -> None:
    """Every Python block type-checks, an option of an enumeration accepts its string, decorators keep types."""
    assert [error for error in mypy_errors if not is_expected(error)] == []


@needs_pyright
def test_page_code_passes_pyright(pyright_errors: list[str]) -> None:
    """Every Python block type-checks, an option of an enumeration accepts its string, decorators keep types."""
    assert [error for error in pyright_errors if not is_expected(error)] == []


@needs_mypy
def test_wrong_names_and_values_fail_mypy(mypy_errors: list[str]) -> None:
    """mypy reports values of a wrong type, names that do not exist, and a wrong use of a decorated function."""
    assert [int(error.split(":")[1]) for error in mypy_errors if is_expected(error)] == WRONG_LINES


@needs_pyright
def test_wrong_names_and_values_fail_pyright(pyright_errors: list[str]) -> None:
    """Pyright reports values of a wrong type, names that do not exist, and a wrong use of a decorated function."""
    assert [int(error.split(":")[1]) for error in pyright_errors if is_expected(error)] == WRONG_LINES


@needs_mypy
def test_enum_options_pass_the_mypy_plugin_of_pydantic(tmp_path: Path) -> None:
    """The plugin of pydantic replaces the types of `__init__`, and they accept strings too."""
    folder = tmp_path / "options"
    folder.mkdir()
    (folder / "options.py").write_text(OPTIONS)
    (folder / "mypy.ini").write_text(PLUGIN)
    assert mypy(folder, "mypy.ini") == []


def public_api() -> tuple[set[str], set[str]]:
    """Return the full names of everything exported, and of the classes of the objects that users get."""
    manager = WebSocketConnectionManager()
    objects: dict[str, Any] = {
        f"{module}.{name}": getattr(importlib.import_module(module), name)
        for module in PUBLIC_MODULES
        for name in importlib.import_module(module).__all__
    }
    classes = {thing for thing in objects.values() if isinstance(thing, type)}
    classes |= {type(manager.events), type(manager.from_thread)}
    return set(objects), {
        f"{base.__module__}.{base.__qualname__}"
        for cls in classes
        for base in cls.__mro__
        if base.__module__.startswith(PACKAGE)
    }


def has_own_error(diagnostic: dict[str, Any]) -> bool:
    """Return whether the type itself lacks a declaration, and not just a class inside it."""
    first, _, rest = diagnostic["message"].partition("\n")
    return diagnostic["severity"] == "error" and ("partially unknown" not in first or "Unknown" in rest)


@needs_pyright
def test_public_api_is_fully_typed(tmp_path: Path) -> None:
    """`pyright --verifytypes` finds no public name, member or parameter without a declared type."""
    answer = run(tmp_path, "pyright", "--verifytypes", PACKAGE, "--ignoreexternal", "--outputjson")
    report = json.loads(answer.stdout)["typeCompleteness"]
    assert Path(report["pyTypedPath"]).samefile(ROOT / PACKAGE / "py.typed")
    exported, classes = public_api()
    public = [
        symbol
        for symbol in report["symbols"]
        if not {symbol["name"], *symbol.get("alternateNames", ())}.isdisjoint(exported | classes)
        or symbol["name"].rpartition(".")[0] in classes
    ]
    assert exported <= {symbol["name"] for symbol in public}
    errors = [
        f"{symbol['name']}: {diagnostic['message']}"
        for symbol in public
        for diagnostic in symbol["diagnostics"]
        if has_own_error(diagnostic)
    ]
    assert errors == []
