"""Tests of rejections: HTTP statuses, close codes, counters and events."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from fastapi import HTTPException, WebSocketException
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import WebSocketRequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.exceptions import ExceptionMiddleware

from fastapi_ws_stabilizer import events as reports_module
from fastapi_ws_stabilizer.config import RejectPolicy
from fastapi_ws_stabilizer.connection.client_address import ClientAddressResolver
from fastapi_ws_stabilizer.errors import (
    ConnectionLimitExceededError,
    DuplicateClientError,
    InvalidTokenError,
    ManagerNotFoundError,
    OriginNotAllowedError,
    RoomLimitError,
    ShutdownError,
    TokenExpiredError,
    TooManyConnectionsError,
)
from fastapi_ws_stabilizer.events import MAX_THROTTLED_KINDS, THROTTLE_INTERVAL, EventBus
from fastapi_ws_stabilizer.handshake import rejection as module
from fastapi_ws_stabilizer.handshake.rejection import Rejector, mark_handled, to_http_exception
from fastapi_ws_stabilizer.wire.handshake import SUBPROTOCOL_KEY, select_subprotocol
from fastapi_ws_stabilizer.wire.v1.frames import SUBPROTOCOL
from tests.support.fake_websocket import FakeServer, with_deadline
from tests.unit.conftest import EventRecorder

BROWSER = {"headers": [(b"host", b"testserver"), (b"origin", b"http://testserver")]}
PROGRAM: dict[str, Any] = {}


def create_rejector(policy: str, events: EventBus | None = None) -> Rejector:
    """Create a rejector without trusted proxies."""
    return Rejector(RejectPolicy(policy), events or EventBus(), ClientAddressResolver(()))


async def rejected(
    error: Exception, *, policy: str = "auto", accept: bool = False, **scope: Any
) -> tuple[FakeServer, Exception]:
    """Reject a client; return its server and the exception to raise."""
    server = FakeServer(**scope)
    if accept:
        await server.accepted()
    raised = await with_deadline(create_rejector(policy).reject(server.websocket, error))
    return server, raised


def kinds(server: FakeServer) -> list[str]:
    """Return the types of the messages that the server was sent."""
    return [message["type"].removeprefix("websocket.") for message in server.taken]


FULL = ConnectionLimitExceededError("max_connections", 10, 4.2)
MANY = TooManyConnectionsError("max_connections_per_address", 10, 4.2)

STATUSES: dict[str, tuple[Any, int, str, str | None]] = {
    "full": (FULL, 503, "the server is full", "5"),
    "at once": (ConnectionLimitExceededError("max_connect_rate", 10, 0.01), 503, "the server is full", "1"),
    "too many": (MANY, 429, "too many connections", "5"),
    "draining": (ShutdownError(), 503, ShutdownError.close_text, "1"),
    "origin": (OriginNotAllowedError("foreign"), 403, "origin not allowed", None),
    "token": (InvalidTokenError("used"), 401, "invalid reconnect token", None),
    "expired": (TokenExpiredError(), 401, "reconnect token expired", None),
    "duplicate": (DuplicateClientError("ann"), 409, "already connected", None),
    "rooms": (RoomLimitError("lobby", 3), 403, RoomLimitError.close_text, None),
    "close code": (WebSocketException(4404, "no such game"), 404, "no such game", None),
    "empty close code": (WebSocketException(4401), 401, "Unauthorized", None),
    "policy": (WebSocketException(1008), 403, "Forbidden", None),
    "app code": (WebSocketException(4001, "later"), 403, "later", None),
    "no status": (WebSocketException(4499), 403, "Forbidden", None),
    "broken": (WebSocketException(1011), 500, "Internal Server Error", None),
    "bug": (ManagerNotFoundError(), 500, "internal error", None),
    "going away": (WebSocketException(1012), 503, "Service Unavailable", None),
    "later": (WebSocketException(1013, "try later"), 503, "try later", None),
}


@pytest.mark.parametrize("what", STATUSES)
def test_rejection_has_matching_http_status(what: str) -> None:
    """Close codes from 4400 have the status code - 4000, others a fixed status; the answer to a bug has no details."""
    error, status, detail, retry = STATUSES[what]
    answer = to_http_exception(error)
    assert (answer.status_code, answer.detail) == (status, detail)
    assert (answer.headers or {}).get("Retry-After") == retry


@pytest.mark.parametrize(
    ("error", "policy", "scope", "accepts"),
    [
        (HTTPException(401), "auto", BROWSER, True),
        (HTTPException(401), "auto", PROGRAM, False),
        (HTTPException(401), "close", BROWSER, True),
        (HTTPException(401), "close", PROGRAM, True),
        (HTTPException(401), "http", BROWSER, False),
        (HTTPException(401), "http", PROGRAM, False),
        (MANY, "auto", BROWSER, True),
        (MANY, "close", PROGRAM, True),
        (MANY, "http", BROWSER, False),
        (FULL, "auto", BROWSER, False),
        (FULL, "close", BROWSER, False),
        (ShutdownError(), "close", BROWSER, False),
        (OriginNotAllowedError("foreign"), "auto", BROWSER, False),
        (OriginNotAllowedError("foreign"), "close", BROWSER, False),
    ],
)
async def test_reject_policy_selects_close_code_or_http_status(
    error: Exception, policy: str, scope: dict[str, Any], accepts: bool
) -> None:
    """`auto` closes browsers, `close` all clients, `http` none; a full server or foreign origin always gets HTTP."""
    server, raised = await rejected(error, policy=policy, **scope)
    if accepts:
        assert kinds(server) == ["accept", "close"]
        assert isinstance(raised, WebSocketException)
    else:
        assert kinds(server) == ["http.response.start", "http.response.body"]
        assert isinstance(raised, WebSocketException)


ANSWERS: dict[str, tuple[Exception, int, bytes, dict[bytes, bytes]]] = {
    "text": (HTTPException(401, "bad token", {"X-Why": "no"}), 401, b'{"detail":"bad token"}', {b"x-why": b"no"}),
    "json": (HTTPException(409, {"why": ["no"]}), 409, b'{"detail":{"why":["no"]}}', {}),
    "full": (FULL, 503, b'{"detail":"the server is full"}', {b"retry-after": b"5"}),
    "no body": (HTTPException(304), 304, b"", {}),
    "no JSON": (HTTPException(403, "not \ud800", {"X-Why": "no"}), 403, b'{"detail":"Forbidden"}', {b"x-why": b"no"}),
}


@pytest.mark.parametrize("what", ANSWERS)
async def test_http_rejection_equals_fastapi_error_response(what: str) -> None:
    """Status, body and headers equal those that FastAPI gives an HTTP route, also without its handler."""
    error, status, body, headers = ANSWERS[what]
    server, _ = await rejected(error, policy="http")
    start, sent = server.taken
    assert (start["status"], sent["body"]) == (status, body)
    assert headers.items() <= dict(start["headers"]).items()


async def own(*_: object) -> None:
    """Handle an error as an application does."""


HANDLERS: dict[str, tuple[dict[Any, Any], dict[int, Any], bool]] = {
    "FastAPI's": ({StarletteHTTPException: http_exception_handler}, {}, False),
    "Starlette's": ({StarletteHTTPException: ExceptionMiddleware(own).http_exception}, {}, False),
    "none": ({}, {}, False),
    "class": ({StarletteHTTPException: own}, {}, True),
    "status code": ({StarletteHTTPException: http_exception_handler}, {401: own}, True),
    "other status": ({StarletteHTTPException: http_exception_handler}, {404: own}, False),
    "other error": ({StarletteHTTPException: http_exception_handler, KeyError: own}, {}, False),
}


@pytest.mark.parametrize("recent", [True, False])
@pytest.mark.parametrize("what", HANDLERS)
async def test_app_handler_answers_rejection_where_supported(
    monkeypatch: pytest.MonkeyPatch, what: str, recent: bool
) -> None:
    """An application's own handler gets the error itself, unless Starlette is too old to send its answer."""
    monkeypatch.setattr(module, "_STARLETTE", (0, 41) if recent else (0, 40))
    handlers, by_status, is_own = HANDLERS[what]
    error = HTTPException(401)
    server, raised = await rejected(error, policy="http", **{"starlette.exception_handlers": (handlers, by_status)})
    assert (raised is error) == (is_own and recent)
    assert (kinds(server) == []) == (is_own and recent)


@pytest.mark.parametrize("policy", ["auto", "close"])
async def test_repeated_rejections_of_address_get_http_status(monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    """A repeated rejection of an address gets 429 for some time; other addresses and errors still get a close code."""
    clock = Clock(monkeypatch)
    rejector = create_rejector(policy)

    async def first_answer(address: str, error: Exception = MANY) -> str:
        server = FakeServer(client=(address, 4711), **BROWSER)
        await with_deadline(rejector.reject(server.websocket, error))
        return kinds(server)[0]

    assert [await first_answer("1.2.3.4") for _ in range(3)] == ["accept", "http.response.start", "http.response.start"]
    assert await first_answer("1.2.3.5") == "accept"
    assert [await first_answer("1.2.3.4", HTTPException(401)) for _ in range(2)] == ["accept", "accept"]
    assert [await first_answer(f"2001:db8::{number}") for number in (1, 2)] == ["accept", "http.response.start"]
    clock.now += module.CLOSE_CODE_INTERVAL
    assert [await first_answer("1.2.3.4") for _ in range(2)] == ["accept", "http.response.start"]


async def test_accepted_rejections_over_rate_get_http_status(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above a rate, browsers get the HTTP answer instead of a close code, because any client can send an `Origin`."""
    now = 1000.0
    monkeypatch.setattr(module, "monotonic", lambda: now)
    rejector = create_rejector("auto")

    async def accepts() -> bool:
        server = FakeServer(**BROWSER)
        await rejector.reject(server.websocket, HTTPException(401))
        return any(message["type"] == "websocket.accept" for message in server.taken)

    assert [await accepts() for _ in range(502)] == [True] * 500 + [False] * 2
    now += 0.02
    assert [await accepts() for _ in range(3)] == [True] * 2 + [False]


async def test_http_rejections_do_not_use_up_accept_rate() -> None:
    """HTTP answers do not count for the accept rate, and `reject="close"` has no such rate."""
    rejector = create_rejector("auto")
    for _ in range(600):
        await rejector.reject(FakeServer().websocket, HTTPException(401))
    server = FakeServer(**BROWSER)
    await rejector.reject(server.websocket, HTTPException(401))
    assert kinds(server) == ["accept", "close"]
    rejector = create_rejector("close")
    for _ in range(600):
        server = FakeServer()
        await rejector.reject(server.websocket, HTTPException(401))
    assert kinds(server) == ["accept", "close"]


@pytest.mark.parametrize("policy", ["auto", "close", "http"])
async def test_rejection_after_accept_closes_with_code(policy: str) -> None:
    """After accept each policy closes with a code, because no HTTP status is possible."""
    server, _ = await rejected(FULL, policy=policy, accept=True)
    assert kinds(server) == ["accept", "close"]
    code, reason = server.close_frames[0]
    assert (code, reason) == (4503, "the server is full; retry=4200")


@pytest.mark.parametrize(
    ("error", "close"),
    [
        (HTTPException(401, "bad token"), (4401, "bad token")),
        (HTTPException(429, "slow down", headers={"Retry-After": "7"}), (4429, "slow down; retry=7000")),
        (HTTPException(403, {"why": "no"}), (4403, '{"why":"no"}')),
        (WebSocketException(4404, "no such game"), (4404, "no such game")),
        (MANY, (4429, "too many connections; retry=4200")),
        (InvalidTokenError(), (4401, "invalid reconnect token")),
        (
            WebSocketRequestValidationError([{"loc": ("query", "n"), "msg": "wrong"}]),
            (1008, '[{"loc":"query.n","msg":"wrong"}]'),
        ),
        (HTTPException(403, "é" * 200), (4403, "é" * 61)),
    ],
    ids=str,
)
async def test_rejection_close_frame_has_code_and_reason(error: Exception, close: tuple[int, str]) -> None:
    """The close code is 4000 + the status; the reason is the detail, cut to the size of a close frame."""
    server, _ = await rejected(error, **BROWSER)
    assert server.close_frames == [close]


@pytest.mark.parametrize(
    "error", [HTTPException(401), FULL, OriginNotAllowedError("null"), WebSocketException(4401)], ids=str
)
async def test_server_without_http_extension_rejects_with_403(error: Exception) -> None:
    """A server without HTTP answers rejects by a close before accept, which is a 403."""
    server, raised = await rejected(error, policy="http", extensions={})
    assert kinds(server) == ["close"]
    assert isinstance(raised, WebSocketException)


@pytest.mark.parametrize("policy", ["auto", "close"])
@pytest.mark.parametrize(
    ("offered", "marker", "answered"),
    [([], None, None), (["chat", SUBPROTOCOL], None, SUBPROTOCOL), (["bearer", "secret"], "bearer", "bearer")],
)
async def test_rejected_browser_gets_non_secret_subprotocol(
    offered: list[str], marker: str | None, answered: str | None, policy: str
) -> None:
    """A rejected browser gets a subprotocol that is known not to be a credential, because Chrome requires one."""
    scope: dict[str, Any] = {} if marker is None else {SUBPROTOCOL_KEY: marker}
    server, _ = await rejected(HTTPException(401), policy=policy, subprotocols=offered, **BROWSER, **scope)
    assert server.taken[0]["subprotocol"] == answered


@pytest.mark.parametrize("policy", ["auto", "close"])
@pytest.mark.parametrize(
    "offered",
    [
        ["chat", "superchat"],
        ["stabilizer.auth.c2VjcmV0"],
        ["bearer", "secret"],
        ["base64url.bearer.authorization.k8s.io.SECRET", "v4.channel.k8s.io"],
    ],
)
async def test_possible_secret_in_subprotocol_is_not_echoed(offered: list[str], policy: str) -> None:
    """If each offered subprotocol may be a secret, the client gets the HTTP answer, so that no log has the secret."""
    server, _ = await rejected(HTTPException(401), policy=policy, subprotocols=offered, **BROWSER)
    assert kinds(server) == ["http.response.start", "http.response.body"]
    assert "secret" not in repr(server.taken).lower()


def test_unoffered_marker_is_not_selected() -> None:
    """A marker that the client did not offer is not selected, because a client fails such a handshake."""
    assert select_subprotocol(FakeServer(subprotocols=["chat"], **{SUBPROTOCOL_KEY: "bearer"}).websocket.scope) is None


async def test_rejection_is_counted_and_emits_event(heard: tuple[EventBus, EventRecorder]) -> None:
    """A rejection is counted by its option or close code; its event has the address, but no credential."""
    events, ear = heard
    for error in (FULL, FULL, MANY, HTTPException(401, "no"), OriginNotAllowedError("foreign"), RoomLimitError("a", 3)):
        await create_rejector("http", events).reject(FakeServer(query="token=secret").websocket, error)
    counted = {"max_connections": 2, "max_connections_per_address": 1, "4401": 1, "4403": 1, "1008": 1}
    assert events.counters.refusals == counted
    assert ear.events == ["connection_refused"] * 6
    assert [one.fields["address"] for one in ear.all] == ["10.0.0.7"] * 6
    assert "secret" not in repr(ear.all)


class Clock:
    """Clock that a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(module, "monotonic", lambda: self.now)
        monkeypatch.setattr(reports_module, "monotonic", lambda: self.now)


def levels(ear: EventRecorder) -> list[tuple[str, int]]:
    """Return the level of each rejection event, with the number of suppressed ones that it states."""
    return [(logging.getLevelName(one.level), one.fields.get("more", 0)) for one in ear.all]


@pytest.mark.parametrize(("error", "level"), [(MANY, "WARNING"), (HTTPException(401), "INFO")], ids=["option", "code"])
def test_rejection_flood_logs_one_line_per_minute(
    monkeypatch: pytest.MonkeyPatch, heard: tuple[EventBus, EventRecorder], error: Exception, level: str
) -> None:
    """In a minute one event of a kind is above DEBUG, with the number of suppressed ones; an option gives a WARNING."""
    clock, (events, ear) = Clock(monkeypatch), heard
    rejector = create_rejector("auto", events)

    def refuse(times: int = 1) -> None:
        for _ in range(times):
            rejector.record_rejection(FakeServer().websocket, error)

    refuse(100)
    clock.now += THROTTLE_INTERVAL - 1
    refuse()
    assert levels(ear) == [(level, 0)] + [("DEBUG", 0)] * 100
    clock.now += 1
    refuse(2)
    assert levels(ear)[101:] == [(level, 100), ("DEBUG", 0)]
    clock.now += THROTTLE_INTERVAL
    refuse()
    clock.now += THROTTLE_INTERVAL
    refuse()
    assert levels(ear)[103:] == [(level, 1), (level, 0)]
    assert events.counters.refusals.total() == 105


def test_rejection_log_is_throttled_per_kind(
    monkeypatch: pytest.MonkeyPatch, heard: tuple[EventBus, EventRecorder]
) -> None:
    """Each kind is throttled separately, but kinds above MAX_THROTTLED_KINDS share one throttle."""
    Clock(monkeypatch)
    events, ear = heard
    rejector = create_rejector("auto", events)
    for code in range(4000, 4000 + 2 * MAX_THROTTLED_KINDS):
        rejector.record_rejection(FakeServer().websocket, WebSocketException(code), "1.2.3.4")
    assert levels(ear) == [("INFO", 0)] * (MAX_THROTTLED_KINDS + 1) + [("DEBUG", 0)] * (MAX_THROTTLED_KINDS - 1)
    assert len(events._throttled["connection_refused"]) == MAX_THROTTLED_KINDS + 1


async def test_disconnect_during_rejection_raises_no_error() -> None:
    """If the client disconnects during its rejection, only the exception that ends the endpoint is raised."""
    server = FakeServer(**BROWSER)
    server.fail(OSError("gone"))
    raised = await with_deadline(create_rejector("auto").reject(server.websocket, HTTPException(401)))
    assert isinstance(raised, WebSocketException)


async def test_blocked_rejection_ends_after_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A blocked rejection ends after REJECTION_TIMEOUT and leaves no task."""
    monkeypatch.setattr(module, "REJECTION_TIMEOUT", 0.02)
    server = FakeServer(**BROWSER)
    server.block()
    raised = await with_deadline(create_rejector("auto").reject(server.websocket, HTTPException(401)))
    assert isinstance(raised, WebSocketException)
    await asyncio.sleep(0)
    assert [task for task in asyncio.all_tasks() if task.get_name() == "ws-refusal"] == []


async def test_websocket_marked_handled_sends_no_close() -> None:
    """Starlette closes after an exception, but a WebSocket that is marked as handled sends no second close."""
    server = FakeServer()
    mark_handled(server.websocket)
    await server.websocket.close(1008)
    await FakeServer().websocket.accept()
    assert server.offered == []
