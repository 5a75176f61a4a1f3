"""Tests of what the doctor looks at: routes, servers, the way to them, and what a manager tells when it starts."""

from __future__ import annotations

import functools
import logging
import math
import multiprocessing
import sys
import time
from types import ModuleType
from typing import Any

import pytest
import uvicorn
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, WebSocket
from starlette.endpoints import WebSocketEndpoint
from starlette.routing import Mount, WebSocketRoute

from fastapi_ws_stabilizer import StableSocketDep, WebSocketConnectionManager, stats_router
from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.doctor import collect as survey_module
from fastapi_ws_stabilizer.doctor.collect import collect_context
from fastapi_ws_stabilizer.doctor.context import unmanaged_routes, version_of
from fastapi_ws_stabilizer.doctor.network_path import path_through
from fastapi_ws_stabilizer.doctor.open_stats import open_stats_routers
from fastapi_ws_stabilizer.doctor.servers import SERVERS, find_server, running_server, with_defaults

MODULES = {module for server in SERVERS.values() for module in server.modules}


@pytest.fixture
def under(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the process look as if it ran under a server, or under none."""

    def pretend(*modules: str) -> None:
        for module in MODULES:
            monkeypatch.delitem(sys.modules, module, raising=False)
        for module in modules:
            monkeypatch.setitem(sys.modules, module, ModuleType(module))

    return pretend


# ── routes ──

manager = WebSocketConnectionManager()


async def raw(websocket: WebSocket) -> None:
    """Reads and writes by itself."""
    await websocket.accept()
    await websocket.send_text("hi")


async def stable(ws: StableSocketDep) -> None:
    """Takes a socket of the library."""


async def by_hand(websocket: WebSocket) -> None:
    """Registers what it has accepted."""
    await websocket.accept()
    await manager.connect("ann", websocket)


async def served(websocket: WebSocket) -> None:
    """Serves in a function of its own."""

    async def inner() -> None:
        async with manager.serve(websocket):
            pass

    await inner()


class Taken:
    """A dependency that is an object."""

    async def __call__(self, websocket: WebSocket) -> Any:
        return await manager.connect("ann", websocket)


# FastAPI of old looks for the names in an object's annotations nowhere, so this one is the type itself.
Taken.__call__.__annotations__["websocket"] = WebSocket


def user() -> str:
    """Who it is."""
    return "ann"


async def named(ws: Any = Depends(manager.socket)) -> None:
    """Names its manager."""


async def identified(ws: Any = Depends(manager.socket_for(user))) -> None:
    """Has its client id from a dependency."""


async def through_object(ws: Any = Depends(Taken())) -> None:
    """Has its socket from an object."""


async def looked_up(websocket: WebSocket, who: str = Depends(user)) -> None:
    """Has dependencies, none of them a socket's."""
    await websocket.accept()


class Reader(WebSocketEndpoint):
    """A class of Starlette, which always reads."""


@pytest.mark.parametrize("endpoint", [stable, by_hand, served, named, identified, through_object])
def test_managed_route_is_recognised(endpoint: Any) -> None:
    """Dependencies of the library, and code that calls a manager, are recognised."""
    app = FastAPI()
    app.add_api_websocket_route("/ws", endpoint)
    assert unmanaged_routes(app) == ()


def test_unmanaged_routes_are_found_everywhere() -> None:
    """Plain endpoints are found in routers and mounted apps, those of Starlette too; a class always reads."""
    app, router = FastAPI(), APIRouter()
    app.add_api_websocket_route("/raw", raw)
    app.add_api_websocket_route("/fine", stable)
    router.add_api_websocket_route("/looked-up", looked_up)
    app.include_router(router, prefix="/router")
    app.router.routes.append(WebSocketRoute("/partial", functools.partial(raw)))
    app.router.routes.append(WebSocketRoute("/class", Reader))
    app.router.routes.append(Mount("/sub", routes=[WebSocketRoute("/plain", raw)]))
    assert sorted(unmanaged_routes(app)) == ["/partial", "/raw", "/router/looked-up", "/sub/plain"]


def test_missing_app_has_no_routes() -> None:
    """What is no app is not looked into."""
    assert unmanaged_routes(None) == ()


# ── servers ──


@pytest.mark.parametrize(
    ("modules", "name"),
    [
        ((), None),
        (("uvicorn",), "uvicorn"),
        (("uvicorn", "hypercorn"), "hypercorn"),
        (("uvicorn", "granian"), "granian"),
        (("daphne",), "daphne"),
        (("uvicorn", "uvicorn_worker"), "uvicorn-worker"),
        (("uvicorn", "uvicorn.workers"), "uvicorn-worker"),
        (("gunicorn.workers.gasgi",), "gunicorn"),
    ],
)
def test_running_server_is_detected_by_loaded_module(under: Any, modules: tuple[str, ...], name: str | None) -> None:
    """An app may import uvicorn for other reasons, so the others are looked for first."""
    under(*modules)
    server = running_server()
    assert (server and server.name) == name


def test_server_options_are_normalised() -> None:
    """Names may be those of the command line; what no check looks at is left out; classes have their names."""
    uvicorn = find_server("uvicorn")
    options = with_defaults(
        uvicorn, {"--timeout-graceful-shutdown": 5, "ws": WebSocket, "limit_max_requests_jitter": 1}
    )
    assert options == {**uvicorn.options, "timeout_graceful_shutdown": 5, "ws": "WebSocket"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"timeout_gracefull_shutdown": 5}, "did you mean 'timeout_graceful_shutdown'"),
        ({"ws_ping_interval": "20s"}, "20s"),
    ],
)
def test_invalid_server_option_is_rejected(given: dict[str, Any], message: str) -> None:
    """A misspelt option, and a value that is no number, are errors that say so."""
    with pytest.raises(ValueError, match=message):
        with_defaults(find_server("uvicorn"), given)


def test_unknown_server_is_rejected() -> None:
    """The error lists the servers that there are."""
    with pytest.raises(
        ValueError, match="known servers: daphne, granian, gunicorn, hypercorn, uvicorn, uvicorn-worker"
    ):
        find_server("apache")


def test_server_version_is_installed_version() -> None:
    """A server that is not installed has none."""
    assert version_of(find_server("uvicorn")) > (0, 20)
    assert version_of(SERVERS["daphne"]) == ()


# ── the way ──


def test_smallest_hop_limit_applies() -> None:
    """Each kind of limit is that of the hop where it is smallest; there may be none."""
    way = path_through(["nginx", "heroku", "fly"])
    assert str(way.smallest("idle_timeout")) == "55 s of heroku"
    assert str(way.smallest("grace")) == "5 s of fly"
    assert way.smallest("max_lifetime") is None


def test_given_limit_replaces_platform_limit_of_same_kind() -> None:
    """A limit that is told takes the place of the platforms', and only limits of its kind."""
    way = path_through(["nginx", "heroku"], idle_timeout=3600)
    assert str(way.smallest("idle_timeout")) == "3600 s, as given"
    assert str(way.smallest("grace")) == "30 s of heroku"


def test_unknown_platform_in_path_is_rejected() -> None:
    """An unknown platform is an error."""
    with pytest.raises(ValueError, match="did you mean 'nginx'"):
        path_through(["ngimx"])


@pytest.mark.parametrize("seconds", [math.nan, 0, -1, math.inf, -math.inf])
@pytest.mark.parametrize("limit", ["idle_timeout", "max_lifetime", "grace"])
def test_invalid_hop_limit_is_rejected(limit: str, seconds: float) -> None:
    """By the way, and by a manager that checks itself."""
    message = f"{limit} must be a number of seconds above zero, not {seconds:g}"
    for look in (functools.partial(path_through, []), WebSocketConnectionManager().check):
        with pytest.raises(ValueError, match=message):
            look(**{limit: seconds})


@pytest.mark.parametrize("seconds", [math.nan, -1, math.inf])
def test_invalid_pre_stop_is_rejected(seconds: float) -> None:
    """None at all is 0."""
    with pytest.raises(ValueError, match="pre_stop must be a number of seconds, not"):
        WebSocketConnectionManager().check(pre_stop=seconds)


def test_options_without_server_are_rejected() -> None:
    """Nobody knows whose options these are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(survey_module, "running_server", lambda: None)
        with pytest.raises(ValueError, match="name of their server"):
            collect_context(WebSocketConfig(), None, refuses=False, server_options={"reload": True})


# ── a manager ──


def test_manager_check_inspects_own_deployment(under: Any) -> None:
    """`check` looks at its own options, its app, what is told, and the server that is loaded."""
    under()
    own = WebSocketConnectionManager(WebSocketConfig(heartbeat_interval=100))
    app = FastAPI()
    own.install(app)
    app.add_api_websocket_route("/raw", raw)
    assert own.check() == []
    assert [finding.code for finding in own.check(platform="nginx")] == ["D01", "D18"]
    assert [finding.code for finding in own.check(platform=["nginx"], idle_timeout=300)] == ["D18"]
    unread = [] if tuple(map(int, uvicorn.__version__.split(".")[:2])) < (0, 50) else ["D06"]  # its `auto` reads ahead
    assert [finding.code for finding in own.check(server="uvicorn")] == [*unread, "D07"]
    options = own.uvicorn_options()
    assert [finding.code for finding in own.check(FastAPI(), server="uvicorn", server_options=options)] == []
    own.on_handshake(lambda ws: None)
    assert [finding.code for finding in own.check(server="gunicorn")] == ["D13"]
    under("uvicorn")
    assert own.check() == []
    assert [finding.code for finding in own.check(server_options={"reload": True})] == [*unread, "D07", "D12"]


def admin(request: Request) -> None:
    if request.headers.get("authorization") != "secret":
        raise HTTPException(401)


def app_with_stats(**options: Any) -> FastAPI:
    app = FastAPI()
    app.include_router(stats_router, prefix="/ws-stats", **options)
    return app


def test_unguarded_stats_router_is_found() -> None:
    """D21 names the prefix of an unguarded stats router, in an included router and in a mounted app too."""
    assert open_stats_routers(app_with_stats()) == ("/ws-stats",)
    outer = FastAPI()
    outer.mount("/admin", app_with_stats())
    assert open_stats_routers(outer) == ("/admin/ws-stats",)
    router = APIRouter(prefix="/v1")
    router.include_router(stats_router, prefix="/stats")
    including = FastAPI()
    including.include_router(router)
    assert open_stats_routers(including) == ("/v1/stats",)


def test_guarded_stats_router_is_not_found() -> None:
    """A dependency of the router, of a router around it, or of the app, that can reject a caller is a guard."""
    assert open_stats_routers(app_with_stats(dependencies=[Depends(admin)])) == ()
    router = APIRouter()
    router.include_router(stats_router)
    including = FastAPI()
    including.include_router(router, prefix="/stats", dependencies=[Depends(admin)])
    assert open_stats_routers(including) == ()
    whole = FastAPI(dependencies=[Depends(admin)])
    whole.include_router(stats_router, prefix="/ws-stats")
    assert open_stats_routers(whole) == ()


def test_non_rejecting_dependency_is_no_stats_guard() -> None:
    """A dependency that only provides something leaves the stats router open."""

    def clock() -> float:
        return 0.0

    assert open_stats_routers(app_with_stats(dependencies=[Depends(clock)])) == ("/ws-stats",)


async def test_start_warns_about_unsuitable_server_once(manager_with: Any, under: Any) -> None:
    """A manager that starts under a server that does not go with it says so, each once, as a warning."""
    under("granian")
    own, heard = manager_with()
    await own.start()
    own._loop = None
    await own.start()
    (report,) = heard.of("doctor_finding")
    assert report.level == logging.WARNING
    assert (report.fields["code"], report.fields["severity"]) == ("D10", "warning")
    assert "granian" in report.fields["problem"]
    assert "preStop" in report.fields["advice"]


@pytest.mark.parametrize(("in_worker", "codes"), [(True, ["D09"]), (False, [])])
async def test_start_under_hypercorn_detects_worker_process(
    manager_with: Any, under: Any, monkeypatch: pytest.MonkeyPatch, in_worker: bool, codes: list[str]
) -> None:
    """Worker processes of hypercorn get no signal; without any the drain begins."""
    under("hypercorn")
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: object() if in_worker else None)
    own, heard = manager_with()
    await own.start()
    assert [report.fields["code"] for report in heard.of("doctor_finding")] == codes


async def test_drain_secret_counts_as_drain_in_pre_stop(
    manager_with: Any, under: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process cannot see `preStop`; who has set a secret can drain there."""
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())
    for server in ("hypercorn", "granian"):
        under(server)
        own, heard = manager_with(drain_secret="drained-by-nobody-else")
        await own.start()
        assert heard.of("doctor_finding") == []


@pytest.mark.parametrize("modules", [(), ("uvicorn",)])
async def test_clean_start_logs_nothing(manager_with: Any, under: Any, modules: tuple[str, ...]) -> None:
    """Under uvicorn, and where nobody knows the server, a start is silent."""
    under(*modules)
    own, heard = manager_with()
    await own.start()
    assert heard.of("doctor_finding") == []


async def test_failing_doctor_does_not_fail_start(
    manager_with: Any, under: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug in a check is told, and the manager starts."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError

    under("uvicorn")
    monkeypatch.setattr(survey_module, "run_checks", fail)
    own, heard = manager_with()
    await own.start()
    assert own.running
    (report,) = heard.of("doctor_failed")
    assert isinstance(report.error, ZeroDivisionError)


@pytest.mark.alone
async def test_start_checks_take_less_than_10_ms(manager_with: Any, under: Any) -> None:
    """They cost a start less than 10 ms, in the best of five."""
    under("granian")
    own, _ = manager_with()
    spent = []
    for _ in range(5):
        begun = time.perf_counter()
        survey_module.report_at_start(own.events, own.config, refuses=True, reported=set())
        spent.append(time.perf_counter() - begun)
    assert min(spent) < 0.01
