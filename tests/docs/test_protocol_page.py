"""Tests of the protocol's page: it has every frame and field of the code and the vectors, and its example runs."""

from __future__ import annotations

import inspect
import json
import re
import sys
from typing import Any

import pytest

from fastapi_ws_stabilizer.close_codes import is_terminal
from fastapi_ws_stabilizer.connection.connection import Connection
from fastapi_ws_stabilizer.connection.credential_expiry import CredentialExpiry
from fastapi_ws_stabilizer.connection.quota import CONTROL_FRAMES, RATE_LIMITED
from fastapi_ws_stabilizer.handlers.dispatcher import Dispatcher
from fastapi_ws_stabilizer.handlers.registry import HandlerRegistry
from fastapi_ws_stabilizer.sessions import idempotency
from fastapi_ws_stabilizer.sessions.idempotency import IdempotencyCache
from fastapi_ws_stabilizer.sessions.session import Session
from fastapi_ws_stabilizer.sessions.store import SessionStore
from fastapi_ws_stabilizer.sessions.v1_protocol import ACK_WITHIN, V1Protocol
from fastapi_ws_stabilizer.wire import identifiers as names
from fastapi_ws_stabilizer.wire import strict_json as json_text
from fastapi_ws_stabilizer.wire.v1 import frames as v1
from fastapi_ws_stabilizer.wire.v1.hello import Hello, ResumeOutcome
from tests.docs.pages import ROOT, blocks, prose, table
from tests.support.virtual_time import run_virtually
from tests.unit.wire.test_vectors import CONVERSATIONS, FRAMES, Play

PAGE = "docs/reference/protocol.md"
PROSE = prose(ROOT / PAGE)
TEXT = (ROOT / PAGE).read_text()
SOURCE = "\n".join(
    inspect.getsource(sys.modules[owner.__module__])
    for owner in (
        V1Protocol,
        CredentialExpiry,
        Connection.request_drain,
        Dispatcher,
        HandlerRegistry,
        IdempotencyCache,
        Session,
        SessionStore,
        v1.Message,
        Hello,
    )
)
FUTURE = {"mood", "later", "priority", "x"}
"""Types and fields in the vectors that receivers have to ignore."""


def fields_on_page(type_: str) -> set[str]:
    """Return the fields in the table of one type."""
    section = TEXT.split(f"\n### {type_}\n", 1)[1].split("\n#", 1)[0]
    return set(re.findall(r"^\| `([\w.]+)` \|", section, flags=re.MULTILINE))


def frames_of_vectors() -> list[dict[str, Any]]:
    """Return every valid frame of the vectors, alone or in a conversation."""
    steps = [step for protocol in CONVERSATIONS for step in protocol["steps"] if "frame" in step]
    return [vector["frame"] for vector in FRAMES if vector["valid"]] + [step["frame"] for step in steps]


def known_types() -> set[str]:
    """Return every type of frame that the code reads or writes, or that the vectors contain."""
    written = set(re.findall(r'\b(?:control_frame|sequenced_frame|envelope)\(\s*"(\w+)"', SOURCE))
    read = set(re.findall(r'\bkind == "(\w+)"', inspect.getsource(V1Protocol))) | {"hello"}
    return written | read | {frame["type"] for frame in frames_of_vectors()} - FUTURE


def test_every_type_is_on_the_page() -> None:
    """The table of types, and the sections, have each type once and no other."""
    rows = [row[0].strip("`") for row in table(PAGE, "| Type | Sent by |")]
    assert len(rows) == len(set(rows))
    assert set(rows) == known_types()
    assert all(f"\n### {type_}\n" in TEXT for type_ in rows)


@pytest.mark.parametrize("type_", sorted(known_types()))
def test_every_field_of_the_vectors_is_on_the_page(type_: str) -> None:
    """Each field of a valid frame in the vectors is in the table of its type."""
    frames = [frame for frame in frames_of_vectors() if frame["type"] == type_]
    fields = {name for frame in frames for name in frame} - FUTURE
    assert fields
    assert fields <= fields_on_page(type_)


def test_every_field_of_the_code_is_on_the_page() -> None:
    """Each field that the code reads from a frame, or writes into one, is in some table."""
    read = set(re.findall(r'\b(?:frame|resume)(?:\.get\(|\[)"(\w+)"', SOURCE))
    read |= set(re.findall(r'\b(?:require_int|optional_\w+)\(\w+, "(\w+)"', SOURCE))
    written = set()
    for call in re.findall(r"(?<!def )control_frame\((.*?)\)\n", SOURCE, flags=re.DOTALL):
        written |= set(re.findall(r'(?:^|[\s(])(\w+)=|"(in)":', call))
    written = {name for pair in written for name in pair if name}
    written |= set(re.findall(r'"(after|within)": ', SOURCE))
    assert {"resume", "token", "seq", "caps"} <= read
    assert {"session", "ping", "ttl", "max", "retry", "ok", "in", "after"} <= written
    on_page = {name.rpartition(".")[2] for type_ in known_types() for name in fields_on_page(type_)}
    assert read | written <= on_page


def test_every_outcome_and_reason_is_on_the_page() -> None:
    """The tables of resume have every outcome and reason that a welcome can contain."""
    outcomes = {row[0].strip("`") for row in table(PAGE, "| Outcome | Session |")}
    assert outcomes == {outcome.value for outcome in ResumeOutcome}
    reasons = {row[0].strip("`") for row in table(PAGE, "| `why` | With | Meaning |")}
    store = inspect.getsource(sys.modules[SessionStore.__module__])
    said = set(re.findall(r'return "(\w+)"', store)) | set(re.findall(r'ResumeOutcome\.LOST, "(\w+)"', store))
    said |= set(re.findall(r'"(\w+)" if denied else "(\w+)"', store).pop())
    assert reasons == said


def test_every_error_code_is_on_the_page() -> None:
    """The page has all error codes that the library uses."""
    codes = {RATE_LIMITED} | set(re.findall(r'InvalidMessageError\(\s*"([a-z_]+)"', SOURCE))
    codes |= set(re.findall(r'"code": "([a-z_]+)"', SOURCE)) | set(re.findall(r'\bcode="([a-z_]+)"', SOURCE))
    codes |= set(re.findall(r'on_no_answer\(\w+, "([a-z_]+)"', SOURCE))
    codes |= set(re.findall(r'reject\(\w+, \w+, "([a-z_]+)"', SOURCE))
    assert {"rate_limited", "in_progress", "handler_failed", "not_read", "auth_refused"} <= codes
    assert {code for code in codes if f"`{code}`" not in PROSE} == set()


def test_numbers_are_those_of_the_code() -> None:
    """Limits and times on the page equal the constants of the package."""
    for text in (
        f"`{v1.SUBPROTOCOL}`",
        f"`{v1.AUTH_PREFIX}`",
        f"| hello | {v1.MAX_HELLO_BYTES // 1024} KiB |",
        f"≤ {v1.MAX_RESUME_TOKEN_CHARS} characters",
        f"`auth` | {v1.MAX_CONTROL_BYTES // 1024} KiB |",
        f"| frame to the client | {v1.MAX_SENT_BYTES // 1024**2} MiB |",
        f"after {v1.ACK_EVERY} frames or {ACK_WITHIN * 1000:.0f} ms",
        f"text frames of {v1.DEFLATE_FROM} bytes or more",
        f"string ≤ {v1.MAX_STAMP_CHARS} characters",
        f"at most {names.MAX_NAME_CHARS} characters and no control",
        f"at most {names.MAX_CODE_CHARS} characters are read",
        f"at most {names.MAX_TEXT_CHARS:,} characters are read",
        f"lists {json_text.MAX_DEPTH} levels deep",
        f"up to {json_text.MAX_FRAME_DEPTH} levels",
        f"{CONTROL_FRAMES.per_second:.0f} a second, {CONTROL_FRAMES.burst:.0f} at once",
        f"up to {idempotency.MAX_KEYS_PER_CLIENT} keys of a client and {idempotency.MAX_KEYS:,} in total",
        f"for at most {idempotency.MAX_AGE:.0f} s",
        f"more than {idempotency.MAX_WAITING} requests",
        f"larger than {idempotency.MAX_ANSWER_BYTES // 1024} KiB",
    ):
        assert text in PROSE, text


def test_terminal_codes_are_those_of_the_code() -> None:
    """The row about terminal codes has exactly the codes after which a client must not reconnect."""
    rows = table(PAGE, "| Code | Sent by | What the client does |")
    (stop,) = [row[0] for row in rows if row[2].startswith("stop.")]
    named = {int(code) for row in rows for code in re.findall(r"\b\d{4}\b", row[0]) if row[0] != stop}
    final = {code for code in (*range(1000, 1016), *range(3000, 5000)) if is_terminal(code)}
    alone, _, others = stop.partition("other 4400 to 4499")
    assert others == ""
    assert final == {int(code) for code in re.findall(r"\d{4}", alone)} | set(range(4400, 4500)) - named


def test_the_example_is_what_the_server_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The transcript matches the real server, step by step."""
    monkeypatch.setattr("fastapi_ws_stabilizer.hub.heartbeat.random.uniform", lambda _, most: most)
    (transcript,) = [block.code for block in blocks("text") if block.page == ROOT / PAGE]
    steps = [_step(*line.split(" ", 1)) for line in transcript.splitlines()]

    async def play() -> None:
        await Play({}).run(steps)

    run_virtually(play())


def _step(side: str, what: str) -> dict[str, Any]:
    by = {"C": "client", "S": "server", "A": "application", "N": "network"}[side]
    if what.startswith("{"):
        return {"from": by, "frame": _with_placeholders(json.loads(what))}
    word, _, value = what.partition(" ")
    return {"from": by, word: json.loads(value) if value else True}


def _with_placeholders(frame: dict[str, Any]) -> dict[str, Any]:
    """Return the frame with placeholders for random values of the server, as in the vectors."""
    names_ = {"token": "$token-", "session": "$session-"}
    return {
        name: _with_placeholders(value)
        if isinstance(value, dict) and name == "resume"
        else names_[name] + value
        if name in names_ and frame.get("type") != "auth"
        else value
        for name, value in frame.items()
    }
