"""Tests of the README, the changelog and the documentation."""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from fastapi import FastAPI
from fastapi.routing import APIWebSocketRoute
from starlette.testclient import TestClient, WebSocketTestSession

import fastapi_ws_stabilizer
from fastapi_ws_stabilizer import (
    Counters,
    StableSocket,
    WebSocketConfig,
    WebSocketConnectionManager,
)
from fastapi_ws_stabilizer.doctor.checks import CHECKS
from tests.docs.deadline import within
from tests.docs.pages import PAGES, ROOT, Block, blocks, name_of, prose, rendered, table

pytestmark = pytest.mark.timeout(30)

PYTHON = blocks("python")
COMPLETE = [block for block in PYTHON if block.complete]
SOURCES = sorted((ROOT / "fastapi_ws_stabilizer").rglob("*.py"))
DEADLINE = 10.0

ORIGIN = "http://testserver"


# ── code ──


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_every_python_block_compiles(block: Block) -> None:
    """Each Python block compiles; a fragment compiles as the body of an async function."""
    flags = 0 if block.complete else ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    compile(block.module, str(block), "exec", flags=flags, dont_inherit=True)


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_every_block_uses_existing_names(block: Block) -> None:
    """Each attribute that a block uses of a manager, a socket or the config exists."""
    known = {"manager": WebSocketConnectionManager(), "ws": StableSocket}
    for node in ast.walk(ast.parse(block.module)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known:
            assert hasattr(known[node.value.id], node.attr), f"{node.value.id}.{node.attr}"
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "WebSocketConfig":
            assert {keyword.arg for keyword in node.keywords if keyword.arg} <= set(WebSocketConfig.model_fields)


@pytest.mark.parametrize("block", COMPLETE, ids=str)
async def test_every_complete_block_runs(block: Block, run: Callable[[Block], ModuleType]) -> None:
    """A block that begins with imports, or extends the quick start, runs, and the tests in it pass."""
    module = within(DEADLINE, lambda: run(block))
    if "pytest.raises(AssertionError)" in block.code and hasattr(WebSocketTestSession, "should_close"):
        pytest.skip("TestClient of Starlette 0.37 cancels the endpoint when the test closes the socket")
    for name, function in list(vars(module).items()):
        if not name.startswith("test_"):
            continue
        if inspect.iscoroutinefunction(function):
            await asyncio.wait_for(function(), DEADLINE)
        else:
            within(DEADLINE, function)


@pytest.mark.parametrize("block", [block for block in COMPLETE if "@app.websocket(" in block.module], ids=str)
def test_every_app_on_page_serves_its_sockets(block: Block, run: Callable[[Block], ModuleType]) -> None:
    """Each WebSocket route of an app on a page accepts a client and closes cleanly."""
    module = run(block)
    routes = [route.path for route in module.app.routes if isinstance(route, APIWebSocketRoute)]
    assert routes
    connected = threading.Semaphore(0)
    module.manager.on_connect(lambda _: connected.release())  # after the hooks of the page
    within(DEADLINE, lambda: _visit(module.app, routes, connected))
    assert module.manager.counters.connections_opened == len(routes)
    assert module.manager.get_connection_count() == 0
    assert not {reason.value for reason in module.manager.counters.endings} & {"error", "policy", "slow_consumer"}


def _visit(app: FastAPI, routes: list[str], connected: threading.Semaphore) -> None:
    """Connect to each route with every credential that a page uses, then disconnect.

    TestClient cancels the app at the disconnect. A database session that is cancelled while the lifespan closes its
    engine never ends, so this waits for the connect hooks.
    """
    with TestClient(app) as client:
        for path in routes:
            url = path.replace("{client_id}", "ann") + "?token=secret-of-ann"
            with client.websocket_connect(url, headers={"cookie": "session=session-of-ann", "origin": ORIGIN}):
                assert connected.acquire(timeout=DEADLINE)


@pytest.mark.parametrize("block", [block for block in PYTHON if block.source], ids=str)
def test_quoted_example_code_matches_its_file(block: Block) -> None:
    """Code that a page takes from an example is identical in both."""
    assert block.code in (ROOT / str(block.source)).read_text()


def test_every_short_example_is_on_page() -> None:
    """Every short example is quoted on a page."""
    examples = {f"examples/{path.name}" for path in (ROOT / "examples").glob("*.py")} - {"examples/__init__.py"}
    assert examples == {block.source for block in PYTHON if block.source}


def test_json_blocks_are_valid_json() -> None:
    """Each JSON block is valid, so that a reader can copy and send it."""
    messages = blocks("json")
    assert messages
    for block in messages:
        assert isinstance(json.loads(block.code), dict), str(block)


# ── tables ──


def test_checks_table_matches_doctor() -> None:
    """Every check is in the table, in order, with its level and its rule."""
    rows = table("docs/deploy/doctor.md", "| Check | Level | Finds |")
    assert rows == [[check.code, check.severity, check.title] for check in CHECKS]
    at_start = next(
        line for line in prose(ROOT / "docs/deploy/doctor.md").splitlines() if "When a manager starts" in line
    )
    assert re.findall(r"D\d\d", at_start) == [check.code for check in CHECKS if check.at_start]


@pytest.mark.parametrize("page", ["docs/how-to/write-handlers.md", "CHANGELOG.md"])
def test_error_reply_codes_match_package(page: str) -> None:
    """The error codes on the page are exactly those of the package."""
    source = (ROOT / "fastapi_ws_stabilizer/handlers/registry.py").read_text()
    codes = set(re.findall(r'InvalidMessageError\(\s*"([a-z_]+)"', source))
    assert codes
    assert {code for code in codes if f"`{code}`" not in prose(ROOT / page)} == set()


# ── completeness ──


def test_every_public_name_is_in_reference() -> None:
    """The reference has every name that can be imported."""
    reference = "\n".join(rendered(path) for path in (ROOT / "docs/reference").glob("*.md"))
    assert {name for name in fastapi_ws_stabilizer.__all__ if name not in reference} == set()


@pytest.mark.parametrize("kind", [WebSocketConnectionManager, StableSocket, Counters])
def test_every_public_member_is_in_reference(kind: type) -> None:
    """Each public method and attribute of the main classes is in the reference."""
    members = {name for name in dir(kind) if not name.startswith("_")} | set(getattr(kind, "__annotations__", {}))
    reference = prose(ROOT / "docs/reference/api.md")
    assert {name for name in members if not re.search(rf"\b{name}\b", reference)} == set()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_file_named_on_page_exists(page: Path) -> None:
    """Paths in backticks, and links, lead to existing files."""
    text = prose(page)
    for path in re.findall(r"`((?:examples|tests|docs)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", text):
        if "://" not in link:
            assert (page.parent / link).is_file(), link


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_make_target_named_on_page_exists(page: Path) -> None:
    """Each command on a page that uses make names a target of the Makefile."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), flags=re.MULTILINE)) <= targets


def test_every_page_is_in_navigation_once() -> None:
    """The navigation contains each page once, and nothing else."""
    listed = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    assert sorted(listed) == sorted(path.relative_to(ROOT / "docs").as_posix() for path in PAGES[2:])


def test_titles_in_navigation_are_those_of_the_pages() -> None:
    """The navigation names each page by its own title, except for the first page."""
    listed = re.findall(r'^ +- "?([^"\n]+)"?: ([\w/-]+\.md)$', (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    titles = {page: (ROOT / "docs" / page).read_text().partition("\n")[0] for _, page in listed}
    wrong = {page: title for title, page in listed if titles[page].replace("`", "") != f"# {title}"}
    assert wrong == {"index.md": "Home"}


def test_every_promise_names_its_tests() -> None:
    """Each numbered guarantee ends with a test file, and so does each row that differs between kinds of clients."""
    page = "docs/concepts/delivery-promises.md"
    promises = re.findall(r"^\d+\. .*$", prose(ROOT / page), flags=re.MULTILINE)
    assert promises
    promises += [row[-1] for row in table(page, "| | Plain WebSocket client |")]
    assert [promise for promise in promises if not re.search(r"`tests/[\w/]+\.py`$", promise)] == []


def test_every_test_named_on_page_exists() -> None:
    """Each test that a page names exists."""
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = {name for page in PAGES for name in re.findall(r"`(test_\w+)`", prose(page))}
    assert named
    assert {name for name in named if not re.search(rf"def {name}\b", tests)} == set()
