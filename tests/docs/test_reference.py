"""Tests of the tables of docs/reference, which the build generates from the code."""

from __future__ import annotations

import ast
import functools
import inspect
import logging
import re
from contextlib import suppress
from datetime import timedelta
from enum import Enum
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

import fastapi_ws_stabilizer
import fastapi_ws_stabilizer.auth
import fastapi_ws_stabilizer.client
from fastapi_ws_stabilizer import (
    DisconnectReason,
    Event,
    Room,
    StableSocket,
    StableSocketDep,
    WebSocketConfig,
    WebSocketConnectionManager,
    WebSocketStabilizerError,
    close_codes,
)
from fastapi_ws_stabilizer.client import ClientError
from fastapi_ws_stabilizer.close_codes import CLOSE_POLICIES
from fastapi_ws_stabilizer.doctor.servers import SERVERS
from fastapi_ws_stabilizer.from_thread import FromThread
from fastapi_ws_stabilizer.stats import prometheus
from tests.docs.pages import PAGES, ROOT, cells, name_of, prose, rendered, table, tables
from tools import reference

CONFIGURATION = "docs/reference/configuration.md"
CLOSE_CODES = "docs/reference/close-codes.md"
ERRORS_PAGE = "docs/reference/errors.md"
LOG_EVENTS = "docs/reference/log-events.md"
CLI = ROOT / "docs/reference/cli.md"
API = ROOT / "docs/reference/api.md"

OPTIONS = table(CONFIGURATION, "| Option | Type | Default |", build=True)
VALUES = table(CONFIGURATION, "| Option | Value | Enum member |", build=True)
REASONS = table(CLOSE_CODES, "| Cause | Code | Close reason |", build=True)
CODES = table(CLOSE_CODES, "| Code | Sent when |", build=True)
ERRORS = table(ERRORS_PAGE, "| Error | Is also a | Code |", build=True)
CLIENT_ERRORS = table(ERRORS_PAGE, "| Error | Is also a | Raised when |", build=True)
EVENTS = table(LOG_EVENTS, "| Event | Level | Fields |", build=True)


def first(rows: list[list[str]]) -> list[str]:
    """Return the first cell of each row, without backticks."""
    return [row[0].strip("`") for row in rows]


def public_errors(module: Any, base: type[Exception]) -> set[str]:
    """Return the names of the errors below a base that a module exports."""
    exported = {name: getattr(module, name) for name in module.__all__}
    return {name for name, value in exported.items() if inspect.isclass(value) and issubclass(value, base)}


# ── pages ──


def test_every_marker_is_filled() -> None:
    """The build replaces each marker on each page, and each table it can generate is used."""
    markers = [marker for page in PAGES for marker in reference.MARKER.findall(page.read_text())]
    assert sorted(markers) == sorted([*reference.TABLES, "events"])
    assert {name_of(page) for page in PAGES if "<!-- generated" in rendered(page)} == set()


def test_unknown_marker_stops_the_build() -> None:
    """An unknown marker is an error."""
    with pytest.raises(KeyError):
        reference.on_page_markdown("<!-- generated: optoins -->\n")


def test_no_page_repeats_a_generated_table() -> None:
    """No table in docs repeats more than half of the names of a generated table, except the one of event meanings."""
    generated = [first(rows) for rows in (OPTIONS, REASONS, ERRORS, EVENTS)]
    repeated = set()
    for page in PAGES[2:]:
        for rows in tables(prose(page)):
            named = set(first([cells(row) for row in rows]))
            if any(len(named & set(names)) > len(names) / 2 for names in generated):
                repeated.add(name_of(page))
    assert repeated == {LOG_EVENTS}


def test_every_generated_cell_has_text() -> None:
    """Each option, value, cause and error has a meaning that ends like a sentence."""
    for rows in (OPTIONS, VALUES, REASONS, ERRORS, CLIENT_ERRORS, EVENTS):
        assert [row for row in rows if not row[-1].endswith(".")] == []
    attributes = table(ERRORS_PAGE, "| Error | Attribute |", build=True)
    assert [row for row in attributes if not row[-1].endswith(".")] == []


# ── signatures ──


def owners_of(section: str) -> tuple[Any, ...]:
    """Return the modules and classes whose members a section of the page of the API has."""
    return {
        "`WebSocketConnectionManager(config=None)`": (WebSocketConnectionManager, FromThread),
        "`StableSocket`": (StableSocket,),
        "`Room`": (Room,),
        "The client": (fastapi_ws_stabilizer.client.Client, fastapi_ws_stabilizer.client),
    }.get(section, (fastapi_ws_stabilizer, fastapi_ws_stabilizer.auth, prometheus))


def parameters_of(function: Any) -> list[tuple[str, str, Any]]:
    """Return name, kind and default of each parameter but `self`; those before a `/` count as positional."""
    parameters = [one for one in inspect.signature(function).parameters.values() if one.name != "self"]
    return [
        (one.name, one.kind.description.replace("positional-only", "positional or keyword"), one.default)
        for one in parameters
    ]


def shown_signatures() -> list[tuple[str, str, str]]:
    """Return the section, name and parameters of each signature in a heading or a first column of the page."""
    shown = []
    for section in re.split(r"^## ", API.read_text(), flags=re.MULTILINE)[1:]:
        title, *lines = section.splitlines()
        first_cells = [cells(line)[0] for line in lines if line.startswith("|")]
        for code in re.findall(r"`([^`]+)`", " ".join((title, *first_cells))):
            call = re.fullmatch(r"(?:await )?([\w.]+)\((.*)\)", code)
            if call and call[1] not in ("len", "bool") and call[2] != "...":
                shown.append((title, call[1], call[2]))
    return shown


@pytest.mark.parametrize(("section", "name", "arguments"), shown_signatures())
def test_signature_of_api_page_is_that_of_code(section: str, name: str, arguments: str) -> None:
    """Names, order and defaults are those of the code. `...` or `**options` stands for the parameters after it."""
    path = name.removeprefix("fastapi_ws_stabilizer.").split(".")
    owner = next(owner for owner in (*owners_of(section), fastapi_ws_stabilizer) if hasattr(owner, path[0]))
    actual = parameters_of(functools.reduce(getattr, path, owner))
    shown = parameters_of(eval(f"lambda {arguments.replace(', ...', ', **options')}: None"))
    if shown and shown[-1][0] == "options":
        shown.pop()
        actual = actual[: len(shown)]
    assert shown == actual


def test_api_page_has_signatures_of_every_section() -> None:
    """The search for signatures finds those of each class."""
    assert {(section, name) for section, name, _ in shown_signatures()} >= {
        ("Dependencies", "Credential"),
        ("`WebSocketConnectionManager(config=None)`", "WebSocketConnectionManager"),
        ("`WebSocketConnectionManager(config=None)`", "broadcast"),
        ("`StableSocket`", "send_json"),
        ("`Room`", "set_presence"),
        ("The client", "Client"),
        ("Metrics", "MetricsCollector"),
        ("Configuration", "WebSocketConfig.for_platform"),
    }


# ── options ──


def test_options_table_has_every_option_and_default() -> None:
    """Each option is in the table, in order, with its default."""
    assert first(OPTIONS) == list(WebSocketConfig.model_fields)
    for row in OPTIONS:
        default = WebSocketConfig.model_fields[row[0].strip("`")].default
        shown = row[2].strip("`")
        seconds = re.fullmatch(r"timedelta\(seconds=(\d+)\)", shown)
        value = timedelta(seconds=int(seconds[1])) if seconds else ast.literal_eval(shown)
        assert value == default, row[0]
        assert type(value) is type(default) or isinstance(default, Enum), row[0]


@pytest.mark.parametrize(
    ("option", "kind"),
    [
        ("heartbeat_interval", "`float`, ≥ 0.001"),
        ("max_connections", "`int` or `None`, > 0"),
        ("max_connect_rate", "`float` or `None`, ≥ 0.001, ≤ 1e+12"),
        ("on_duplicate", '`"replace"`, `"reject"`, `"allow"`'),
        ("require_pong", '`"auto"`, `True`, `False`'),
        ("trusted_proxies", "list of `str`"),
        ("reconnect_token_ttl", "`timedelta`, > 0"),
        ("num_shards", "`int`, > 0, ≤ 4096"),
        ("heartbeat_payload", "`any`"),
        ("drain_secret", "`str` or `None`"),
    ],
)
def test_options_table_shows_type_and_bounds(option: str, kind: str) -> None:
    """Type and bounds are those of the annotation."""
    assert {row[0]: row[1] for row in OPTIONS}[f"`{option}`"] == kind


def test_options_table_bounds_are_enforced() -> None:
    """A number outside the bounds of the table is rejected."""
    for name, kind, *_ in OPTIONS:
        for sign, limit in re.findall(r"([≥>≤]) ([\d.e+]+)", kind):
            if "timedelta" not in kind:
                beyond = float(limit) + (1 if sign == "≤" else -1)
                with pytest.raises(ValueError, match=name.strip("`")):
                    WebSocketConfig.model_validate({name.strip("`"): beyond if "float" in kind else int(beyond)})


def test_options_name_their_unit() -> None:
    """Each option with a duration, a rate or a size names its unit."""
    for name, kind, _, meaning in OPTIONS:
        if "`float`" in kind:
            assert re.search("[Ss]econds|per second", meaning), name
        if re.search("_bytes|_size|_memory", name):
            assert "bytes" in meaning, name


def test_values_table_has_every_enum_value() -> None:
    """Each value of an option with an enum is in the table, with its member."""
    fields = WebSocketConfig.model_fields.items()
    expected = [
        [f"`{name}`", f'`"{member.value}"`', f"`{type(member).__name__}.{member.name}`"]
        for name, field in fields
        if isinstance(field.default, Enum)
        for member in type(field.default)
    ]
    assert [row[:3] for row in VALUES] == expected


# ── close codes ──


def test_causes_table_is_that_of_the_policies() -> None:
    """Each cause is in the table, with its code, its reason, and what happens to queued and unread messages."""
    yes_no = {True: "yes", False: "no"}
    assert [row[:5] for row in REASONS] == [
        [f"`{reason.value}`", str(rule.code), rule.reason or "-", yes_no[rule.flush], yes_no[rule.deliver]]
        for reason, rule in CLOSE_POLICIES.items()
    ]
    assert len(REASONS) == len(DisconnectReason)


def test_codes_table_has_every_close_code() -> None:
    """Each code of a cause, of an error and of the protocol is in the table, once and in order."""
    shown = [int(code) for row in CODES for code in re.findall(r"\d{4}", row[0]) if "status" not in row[0]]
    assert shown == sorted(set(shown))
    errors = (getattr(fastapi_ws_stabilizer, name) for name in first(ERRORS))
    used = {rule.code for rule in CLOSE_POLICIES.values()} | {error.close_code for error in errors}
    used |= {close_codes.SESSION_ENDED, close_codes.SUPERSEDED, close_codes.DETACHED}
    assert used <= set(shown)


# ── errors ──


def test_errors_tables_have_every_error() -> None:
    """Each public error of the package and of its client is in its table."""
    assert set(first(ERRORS)) == public_errors(fastapi_ws_stabilizer, WebSocketStabilizerError)
    assert set(first(CLIENT_ERRORS)) == public_errors(fastapi_ws_stabilizer.client, ClientError)
    assert len(ERRORS) + len(CLIENT_ERRORS) == len({*first(ERRORS), *first(CLIENT_ERRORS)})


def test_errors_table_has_bases_and_close_codes() -> None:
    """Each row has the direct bases of the error, and its close code unless the connection is already closed."""
    for name, bases, code, text, _ in ERRORS:
        error = getattr(fastapi_ws_stabilizer, name.strip("`"))
        direct = {base.__name__ for base in error.__bases__} - {"WebSocketStabilizerError"}
        assert set(re.findall(r"`(\w+)`", bases)) == direct
        if not issubclass(error, fastapi_ws_stabilizer.SocketClosed):
            assert (int(code), text) == (error.close_code, error.close_text or "-")


def test_error_attributes_exist() -> None:
    """Each attribute of the table is one of the error."""
    modules = {**vars(fastapi_ws_stabilizer), **vars(fastapi_ws_stabilizer.client)}
    for error, attribute, _ in table(ERRORS_PAGE, "| Error | Attribute |", build=True):
        kind, name = modules[error.strip("`")], attribute.strip("`")
        source = "".join(inspect.getsource(base) for base in kind.__mro__[:-1] if base.__module__ != "builtins")
        assert hasattr(kind, name) or f"self.{name} = " in source, error


# ── log events ──


def test_events_table_has_every_event() -> None:
    """Each event that the package emits is in the table, and no other."""
    assert sorted(first(EVENTS)) == sorted(reference.emitted_events())


def test_every_log_record_has_an_event_of_the_table() -> None:
    """A name that the source gives to an emitting method, in any spelling of the call, is in the table."""
    package = ROOT / "fastapi_ws_stabilizer"  # the client emits events to its listeners; they are not log records
    sources = "\n".join(path.read_text() for path in package.rglob("*.py") if path.parent != package / "client")
    methods = "|".join(reference.EMITTERS)
    named = set(re.findall(rf"\b_?(?:{methods})\(\s*(?:\w+, )?\"([a-z_]+)\"", sources))
    named |= set(re.findall(r'"event": "([a-z_]+)"', sources))
    assert len(named) > 40
    assert named <= set(first(EVENTS))


@pytest.mark.parametrize(
    ("event", "level", "fields"),
    [
        ("connection_opened", "INFO", ["client_id", "connection_id"]),
        ("session_ended", "INFO", ["client_id", "session_id", "reason", "unacknowledged"]),
        ("handler_failed", "ERROR", ["client_id", "connection_id"]),
        ("rate_limited", "WARNING", ["client_id", "connection_id", "option", "message_type", "more"]),
        ("heartbeat_payload_invalid", "ERROR", ["client_id", "connection_id"]),
        ("hook_stopped", "DEBUG", ["hook", "cause", "client_id", "connection_id", "room"]),
        ("unknown_environment_option", "WARNING", ["variable"]),
        ("listener_failed", "ERROR", []),
    ],
)
def test_events_table_shows_level_and_fields(event: str, level: str, fields: list[str]) -> None:
    """Level and fields are those of the calls: direct, by a connection or a store, and of a logger itself."""
    row = next(row for row in EVENTS if row[0] == f"`{event}`")
    assert (row[1], re.findall(r"`(\w+)`", row[2])) == (level, fields)


def test_emitted_events_have_level_and_fields_of_the_table() -> None:
    """The level and fields of each emitted event are within those of the table."""
    manager = WebSocketConnectionManager(WebSocketConfig(max_bad_messages=1, max_connections_per_client=1))
    app = FastAPI(lifespan=manager.lifespan)
    emitted: list[Event] = []
    manager.events.subscribe(emitted.append)

    @manager.on_message("known")
    async def known(ws: StableSocket, message: int) -> None: ...

    @manager.on_disconnect
    async def fail(ws: StableSocket) -> None:
        raise LookupError

    @app.websocket("/ws/{client_id}")
    async def endpoint(ws: StableSocketDep) -> None:
        await ws.run()

    with TestClient(app) as client:
        for path in ("/ws/ann", "/nowhere"):
            with suppress(WebSocketDisconnect), client.websocket_connect(path) as socket:
                for _ in range(3):
                    socket.send_text('{"type": "unknown"}')
                while True:
                    socket.receive_text()
    shown = {row[0].strip("`"): row for row in EVENTS}
    names = {event.event for event in emitted}
    assert names >= {"connection_opened", "connection_ended", "bad_message", "no_websocket_route", "drain_started"}
    assert "disconnect_hook_failed" in names
    for event in emitted:
        _, levels, fields, meaning = shown[event.event]
        assert logging.getLevelName(event.level) in levels
        if event.event != "shutdown":
            assert set(event.fields) <= set(re.findall(r"`(\w+)`", fields + meaning)), event


# ── command line ──


def test_cli_page_has_every_command_and_argument() -> None:
    """Each command has a section with what its `--help` prints, and the doctor names every server."""
    page = rendered(CLI)
    commands = re.findall(r"^## (\w+)$", page, flags=re.MULTILINE)
    assert commands == ["drain", "doctor"]
    for command in commands:
        printed = reference.help_of(command)
        assert "--help" in printed
        assert f"```text\n{printed}```" in page
    servers = re.search(r"--server {([\w,-]+)}", page)
    assert servers is not None
    assert set(servers[1].split(",")) == set(SERVERS)


def test_arguments_that_pages_name_exist() -> None:
    """Each argument of the doctor on its page is one of the command."""
    named = set(re.findall(r"`(--[a-z][a-z0-9-]+)", prose(ROOT / "docs/deploy/doctor.md")))
    offered = set(re.findall(r"--[a-z][a-z0-9-]+", reference.help_of("doctor")))
    assert named - offered == {"--forwarded-allow-ips"}


def test_options_are_described_at_run_time() -> None:
    """The docstring of each option is its description in the JSON schema, too."""
    assert [name for name, field in WebSocketConfig.model_fields.items() if not field.description] == []
