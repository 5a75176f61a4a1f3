"""Only `compat/` and `servers/uvicorn/` use private parts of FastAPI, Starlette, uvicorn and `websockets`.

Python does not say to which package an attribute belongs. So the search goes by names: a private name counts as foreign
if the package itself defines no such name, or if it is read from an object that belongs to another package.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastapi_ws_stabilizer

PACKAGE = Path(fastapi_ws_stabilizer.__file__).parent
TREES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text("utf-8")) for path in PACKAGE.rglob("*.py")}
ALLOWED = ("compat/", "servers/uvicorn/")
FOREIGN = ("fastapi", "starlette", "uvicorn", "websockets")
FOREIGN_OBJECTS = ("app", "request", "route", "router", "transport", "websocket")
"""What variables and attributes with objects of these packages are called."""

OF_PYTHON = ("_exception", "_getframe")
"""Private names of asyncio's futures and of `sys` that the package uses."""

PRIVATE_PATH = re.compile(rf"(?:{'|'.join(FOREIGN)})(?:\.\w+)*\._\w+")
ACCESSORS = ("getattr", "setattr", "hasattr", "delattr", "attrgetter", "methodcaller")


def is_private(name: str) -> bool:
    """Return whether a name is private, and does not belong to Python itself, as `__self__` does."""
    return name.startswith("_") and not name.endswith("__") and name not in OF_PYTHON


def defined_names(tree: ast.AST) -> Iterator[str]:
    """Yield the names of functions, classes, variables and attributes of `self` that a module defines."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id in ("self", "cls")
        ):
            yield node.attr


def foreign_imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield each import from another of these packages: the name in the module, and the dotted name of its origin."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [(alias.asname or alias.name.split(".")[0], alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found = [(alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names]
        else:
            continue
        yield from (pair for pair in found if pair[1].split(".")[0] in FOREIGN)


def reach_ins(tree: ast.AST, own: set[str]) -> list[str]:
    """Return what a module uses of the private parts of the packages.

    Args:
        tree: The module.
        own: Names that this package defines.
    """
    imported = dict(foreign_imports(tree))
    found = [origin for origin in imported.values() if any(map(is_private, origin.split(".")))]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = ast.unparse(node.value)
            is_foreign = owner.split(".")[0] in imported or owner.split(".")[-1] in FOREIGN_OBJECTS
            if is_foreign or node.attr not in own:
                found.append(f"{owner}.{node.attr}")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ACCESSORS:
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            found += [name for name in names if any(map(is_private, name.split(".")))]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and PRIVATE_PATH.fullmatch(node.value):
            found.append(node.value)
    return found


def test_only_compat_uses_private_parts_of_other_packages() -> None:
    """Each use of a private part is in a folder that states its versions and its fallback."""
    own = {name for module, tree in TREES.items() if not module.startswith(ALLOWED) for name in defined_names(tree)}
    others = {module: reach_ins(tree, own) for module, tree in TREES.items() if not module.startswith(ALLOWED)}
    assert {module: found for module, found in others.items() if found} == {}


def test_compat_uses_private_parts_of_other_packages() -> None:
    """The search finds the uses that are allowed. Otherwise it would find nothing at all."""
    found = {name for module, tree in TREES.items() if module.startswith(ALLOWED) for name in reach_ins(tree, set())}
    assert {"websocket._receive", "_getters", "starlette._exception_handler"} <= found


@pytest.mark.parametrize(
    "code",
    [
        "import starlette._utils",
        "from starlette._utils import is_async_callable",
        "from uvicorn.protocols import _x",
        "import uvicorn as server\nserver._x",
        "from fastapi.routing import APIRoute as Route\nRoute._x()",
        "self.websocket._receive",
        "websocket._send = send",
        "connection._unknown",
        "self._unknown",
        "getattr(protocol, '_receive', None)",
        "operator.attrgetter('conn._x')",
        "name = 'starlette._exception_handler'",
    ],
)
def test_use_of_private_part_is_found(code: str) -> None:
    """Imports, attributes, names in strings and paths of modules are found, though this package has equal names."""
    assert reach_ins(ast.parse(code), {"_x", "_receive", "_send", "is_async_callable"})


@pytest.mark.parametrize(
    "code",
    [
        "self._own = other._own",
        "from starlette.websockets import WebSocket\nWebSocket.receive",
        "getattr(send, '__self__', None)",
        "getattr(connection, 'own')",
        "import asyncio\nfrom fastapi_ws_stabilizer.tasks import _own",
    ],
)
def test_use_of_public_or_own_part_is_allowed(code: str) -> None:
    """Public names, names of Python and private names of this package are not found."""
    assert reach_ins(ast.parse(code), {"_own"}) == []
