"""Tests of the README, the changelog and the documentation."""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

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
    WebSocketStabilizerError,
)
from fastapi_ws_stabilizer.cli import main
from fastapi_ws_stabilizer.close_codes import CLOSE_POLICIES
from fastapi_ws_stabilizer.doctor.checks import CHECKS
from fastapi_ws_stabilizer.doctor.servers import SERVERS
from tests.docs.deadline import within
from tests.docs.pages import PAGES, ROOT, Block, blocks, name_of, prose, table

pytestmark = pytest.mark.timeout(30)

PYTHON = blocks("python")
COMPLETE = [block for block in PYTHON if block.complete]
SOURCES = sorted((ROOT / "fastapi_ws_stabilizer").rglob("*.py"))
DEADLINE = 10.0

CONFIG_PAGES = ("README.md", "docs/reference/configuration.md")
ORIGIN = "http://testserver"


@pytest.fixture
def run() -> Iterator[Callable[[Block], ModuleType]]:
    """Executes blocks, each as a module of its own that is forgotten after the test."""
    made: list[str] = []

    def execute(block: Block) -> ModuleType:
        module = ModuleType(re.sub(r"\W", "_", f"page_{block}"))
        # pydantic and typing look a class's module up by its name.
        sys.modules[module.__name__] = module
        made.append(module.__name__)
        exec(compile(block.code, str(block), "exec"), vars(module))
        return module

    yield execute
    for name in made:
        del sys.modules[name]


# ── code ──


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_every_block_is_python(block: Block) -> None:
    """Each Python block compiles, a fragment as the body of an async function."""
    flags = 0 if block.complete else ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    compile(block.code, str(block), "exec", flags=flags, dont_inherit=True)


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_every_block_uses_names_that_exist(block: Block) -> None:
    """What a block takes of a manager, a socket and the config is there."""
    known = {"manager": WebSocketConnectionManager(), "ws": StableSocket}
    for node in ast.walk(ast.parse(block.code)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known:
            assert hasattr(known[node.value.id], node.attr), f"{node.value.id}.{node.attr}"
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "WebSocketConfig":
            assert {keyword.arg for keyword in node.keywords if keyword.arg} <= set(WebSocketConfig.model_fields)


@pytest.mark.parametrize("block", COMPLETE, ids=str)
async def test_every_complete_block_runs(block: Block, run: Callable[[Block], ModuleType]) -> None:
    """A block that begins with its imports runs as it stands, and the tests in it pass."""
    module = within(DEADLINE, lambda: run(block))
    if "pytest.raises(AssertionError)" in block.code and hasattr(WebSocketTestSession, "should_close"):
        pytest.skip("TestClient of Starlette 0.37 cancels the endpoint when the test leaves the socket")
    for name, function in list(vars(module).items()):
        if not name.startswith("test_"):
            continue
        if inspect.iscoroutinefunction(function):
            await asyncio.wait_for(function(), DEADLINE)
        else:
            within(DEADLINE, function)


@pytest.mark.parametrize("block", [block for block in COMPLETE if "@app.websocket(" in block.code], ids=str)
def test_every_app_on_a_page_serves_its_sockets(block: Block, run: Callable[[Block], ModuleType]) -> None:
    """Each WebSocket route of an app on a page accepts a client and lets it go."""
    module = run(block)
    routes = [route.path for route in module.app.routes if isinstance(route, APIWebSocketRoute)]
    assert routes
    within(DEADLINE, lambda: _visit(module.app, routes))
    assert module.manager.totals.connections_opened == len(routes)
    assert module.manager.get_connection_count() == 0
    assert not {reason.value for reason in module.manager.totals.endings} & {"error", "policy", "slow_consumer"}


def _visit(app: FastAPI, routes: list[str]) -> None:
    """Connect to each route, with every credential that a page knows, and leave."""
    with TestClient(app) as client:
        for path in routes:
            url = path.replace("{client_id}", "ann") + "?token=secret-of-ann"
            with client.websocket_connect(url, headers={"cookie": "session=session-of-ann", "origin": ORIGIN}):
                pass


@pytest.mark.parametrize("block", [block for block in PYTHON if block.source], ids=str)
def test_a_block_that_names_an_example_is_a_part_of_it(block: Block) -> None:
    """Code that a page takes from an example stands in it word for word."""
    assert block.code in (ROOT / str(block.source)).read_text()


def test_every_short_example_is_shown() -> None:
    """No example is kept from the readers."""
    examples = {f"examples/{path.name}" for path in (ROOT / "examples").glob("*.py")} - {"examples/__init__.py"}
    assert examples == {block.source for block in PYTHON if block.source}


def test_the_json_on_the_pages_is_json() -> None:
    """A reader can copy each message from a page and send it."""
    messages = blocks("json")
    assert messages
    for block in messages:
        assert isinstance(json.loads(block.code), dict), str(block)


# ── tables ──


@pytest.mark.parametrize("page", CONFIG_PAGES)
def test_the_table_of_options_is_that_of_the_config(page: str) -> None:
    """Every option stands in the table, in order, with its default."""
    rows = table(page, "| Option | Default | Meaning |")
    defaults = {row[0].strip("`"): _value(row[1].strip("`")) for row in rows}
    assert list(defaults) == list(WebSocketConfig.model_fields)
    for name, field in WebSocketConfig.model_fields.items():
        assert defaults[name] == field.default, name
        assert type(defaults[name]) is type(field.default) or isinstance(field.default, str), name


def _value(text: str) -> Any:
    hours = re.fullmatch(r"timedelta\(hours=(\d+)\)", text)
    return timedelta(hours=int(hours.group(1))) if hours else ast.literal_eval(text)


def test_the_readmes_close_codes_are_those_of_the_package() -> None:
    """Every ending stands in the README's table, in order, with its code."""
    found = [(row[0].strip("`"), int(row[1])) for row in table("README.md", "| Reason | Code | When |")]
    assert found == [(reason.value, rule.code) for reason, rule in CLOSE_POLICIES.items()]


def test_the_table_of_endings_is_that_of_the_package() -> None:
    """Every ending stands in the reference, with code, text, and what happens to messages on their way."""
    found = [row[:5] for row in table("docs/reference/close-codes.md", "| Reason | Code | Close reason |")]
    yes_no = {True: "yes", False: "no"}
    assert found == [
        [f"`{reason.value}`", str(rule.code), rule.text or "-", yes_no[rule.flush], yes_no[rule.deliver]]
        for reason, rule in CLOSE_POLICIES.items()
    ]


def test_the_table_of_events_is_that_of_the_package() -> None:
    """Every event that the package reports stands in the table, and no other."""
    source = "\n".join(path.read_text() for path in SOURCES)
    reported = set(re.findall(r'\b(?:tell|bug)\(\s*"([a-z_]+)"', source))
    told = {row[0].strip("`") for row in table("docs/how-to/watch-what-goes-on.md", "| Event | Level | Means |")}
    assert reported <= told
    assert {event for event in told if f'"{event}"' not in source} == set()


def test_the_table_of_checks_is_that_of_the_doctor() -> None:
    """Every check stands in the table, in order, with its level and its rule."""
    rows = table("docs/deploy/doctor.md", "| Check | Level | Finds |")
    assert rows == [[check.code, check.severity, check.title] for check in CHECKS]
    at_start = next(line for line in prose(ROOT / "docs/deploy/doctor.md").splitlines() if "by the server that" in line)
    assert re.findall(r"D\d\d", at_start) == [check.code for check in CHECKS if check.at_start]


def test_the_table_of_the_doctor_s_arguments_is_that_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Every argument of the command stands in the table, and no other; so does every server."""
    with pytest.raises(SystemExit):
        main(["doctor", "--help"])
    told = table("docs/deploy/doctor.md", "| Argument | Says |")
    offered = set(re.findall(r"--[a-z][a-z0-9-]+", capsys.readouterr().out)) - {"--help"}
    assert {argument for row in told for argument in re.findall(r"--[a-z][a-z0-9-]+", row[0])} == offered
    (servers,) = [row[1] for row in told if "--server" in row[0]]
    assert set(re.findall(r"`([\w-]+)`", servers)) == set(SERVERS)


def test_the_table_of_errors_is_that_of_the_package() -> None:
    """Every error stands in the table, with what else it is."""
    public = vars(fastapi_ws_stabilizer)
    errors = {name for name, value in public.items() if inspect.isclass(value) and issubclass(value, Exception)}
    rows = table("docs/reference/api.md", "| Error | Is also a | Means |")
    told = {row[0].strip("`"): re.findall(r"`(\w+)`", row[1]) for row in rows}
    assert set(told) == errors - {WebSocketStabilizerError.__name__}
    for name, others in told.items():
        assert set(others) <= {base.__name__ for base in public[name].__mro__}, name


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md"])
def test_the_codes_of_error_replies_are_those_of_the_package(page: str) -> None:
    """A client that knows the codes of a page knows all."""
    source = (ROOT / "fastapi_ws_stabilizer/routing/messages.py").read_text()
    codes = set(re.findall(r'InvalidMessageError\(\s*"([a-z_]+)"', source))
    assert codes
    assert {code for code in codes if f"`{code}`" not in prose(ROOT / page)} == set()


# ── completeness ──


def test_every_public_name_is_in_the_reference() -> None:
    """The reference of the API, or a page that it names, has every name that can be imported."""
    reference = prose(ROOT / "docs/reference/api.md")
    assert {name for name in fastapi_ws_stabilizer.__all__ if name not in reference} == set()


@pytest.mark.parametrize("kind", [WebSocketConnectionManager, StableSocket, Counters])
def test_every_public_member_is_in_the_reference(kind: type) -> None:
    """Each method and attribute of the classes that everybody uses is in the reference."""
    members = {name for name in dir(kind) if not name.startswith("_")} | set(getattr(kind, "__annotations__", {}))
    reference = prose(ROOT / "docs/reference/api.md")
    assert {name for name in members if not re.search(rf"\b{name}\b", reference)} == set()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    """Paths in backticks, and links, lead to files."""
    text = prose(page)
    for path in re.findall(r"`((?:examples|tests|docs)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", text):
        if "://" not in link:
            assert (page.parent / link).is_file(), link


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_make_target_that_a_page_names_exists(page: Path) -> None:
    """A command that a page tells to type is in the Makefile."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), flags=re.MULTILINE)) <= targets


def test_every_page_can_be_reached() -> None:
    """The navigation holds each page once, and nothing else."""
    listed = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    assert sorted(listed) == sorted(path.relative_to(ROOT / "docs").as_posix() for path in PAGES[2:])


def test_every_promise_names_the_tests_that_hold_it() -> None:
    """A promise without a test is none: each numbered line ends with a file of tests."""
    promises = re.findall(r"^\d+\. .*$", prose(ROOT / "docs/concepts/delivery-promises.md"), flags=re.MULTILINE)
    assert promises
    assert [promise for promise in promises if not re.search(r"`tests/[\w/]+\.py`$", promise)] == []


def test_every_test_that_a_page_names_exists() -> None:
    """A row that says which test would be red names one that there is."""
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = {name for page in PAGES for name in re.findall(r"`(test_\w+)`", prose(page))}
    assert named
    assert {name for name in named if not re.search(rf"def {name}\b", tests)} == set()
