"""Tests of what the doctor inspects: routes, servers, network paths, and a starting manager."""

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
from fastapi_ws_stabilizer.doctor import collect as collect_module
from fastapi_ws_stabilizer.doctor.collect import CheckOptions, collect_context
from fastapi_ws_stabilizer.doctor.context import unmanaged_routes, version_of
from fastapi_ws_stabilizer.doctor.network_path import path_through
from fastapi_ws_stabilizer.doctor.open_stats import open_stats_routers
from fastapi_ws_stabilizer.doctor.servers import SERVERS, find_server, running_server, with_defaults

MODULES = {module for server in SERVERS.values() for module in server.modules}


@pytest.fixture
def under(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that makes the process look as if these servers were loaded."""

    def pretend(*modules: str) -> None:
        for module in MODULES:
            monkeypatch.delitem(sys.modules, module, raising=False)
        for module in modules:
            monkeypatch.setitem(sys.modules, module, ModuleType(module))

    return pretend


# ── routes ──

manager = WebSocketConnectionManager()


async def raw(websocket: WebSocket) -> None:
    """Accept and send, without the library."""
    await websocket.accept()
    await websocket.send_text("hi")


async def stable(ws: StableSocketDep) -> None:
    """Take a socket of the library."""


async def connect_explicitly(websocket: WebSocket) -> None:
    """Connect an accepted WebSocket explicitly."""
    await websocket.accept()
    await manager.connect("ann", websocket)


async def served(websocket: WebSocket) -> None:
    """Serve in an inner function."""

    async def inner() -> None:
        async with manager.serve(websocket):
            pass

    await inner()


class SocketDependency:
    """Object that is a dependency."""

    async def __call__(self, websocket: WebSocket) -> Any:
        return await manager.connect("ann", websocket)


# Older FastAPI does not resolve names in the annotations of an object, so the annotation is the type itself.
SocketDependency.__call__.__annotations__["websocket"] = WebSocket


def user() -> str:
    """Return an identity."""
    return "ann"


async def named(ws: Any = Depends(manager.socket)) -> None:
    """Take the socket of a manager."""


async def identified(ws: Any = Depends(manager.socket_for(user))) -> None:
    """Take the client id from a dependency."""


async def through_object(ws: Any = Depends(SocketDependency())) -> None:
    """Take the socket from an object."""


async def looked_up(websocket: WebSocket, user_id: str = Depends(user)) -> None:
    """Take a dependency that is no socket."""
    await websocket.accept()


class Reader(WebSocketEndpoint):
    """Endpoint class of Starlette, which always reads."""


@pytest.mark.parametrize("endpoint", [stable, connect_explicitly, served, named, identified, through_object])
def test_managed_route_is_recognised(endpoint: Any) -> None:
    """A route is managed if it has a dependency of the library or calls a manager."""
    app = FastAPI()
    app.add_api_websocket_route("/ws", endpoint)
    assert unmanaged_routes(app) == ()


def test_unmanaged_routes_are_found_everywhere() -> None:
    """Unmanaged routes are found in routers and mounts, also those of Starlette; an endpoint class always reads."""
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
    """A missing app has no routes."""
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
    """The other servers take precedence over uvicorn, which an app may import for other reasons."""
    under(*modules)
    server = running_server()
    assert (server and server.name) == name


def test_server_options_are_normalised() -> None:
    """Option names may be those of the command line, unchecked options are removed, and classes become names."""
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
    """A misspelt option, and a value that is not a number, raise."""
    with pytest.raises(ValueError, match=message):
        with_defaults(find_server("uvicorn"), given)


def test_unknown_server_is_rejected() -> None:
    """An unknown server raises with the list of known ones."""
    with pytest.raises(
        ValueError, match="known servers: daphne, granian, gunicorn, hypercorn, uvicorn, uvicorn-worker"
    ):
        find_server("apache")


def test_server_version_is_installed_version() -> None:
    """The version is that of the installed server, and is empty without one."""
    assert version_of(find_server("uvicorn")) > (0, 20)
    assert version_of(SERVERS["daphne"]) == ()


# ── network path ──


def test_smallest_hop_limit_applies() -> None:
    """The smallest limit of all hops applies for each kind, and may be missing."""
    network_path = path_through(["nginx", "heroku", "fly"])
    assert str(network_path.smallest("idle_timeout")) == "55 s of heroku"
    assert str(network_path.smallest("grace")) == "5 s of fly"
    assert network_path.smallest("max_lifetime") is None


def test_given_limit_replaces_platform_limit_of_same_kind() -> None:
    """A given limit replaces the platforms' limits of its kind only."""
    network_path = path_through(["nginx", "heroku"], idle_timeout=3600)
    assert str(network_path.smallest("idle_timeout")) == "3600 s, as given"
    assert str(network_path.smallest("grace")) == "30 s of heroku"


def test_unknown_platform_in_path_is_rejected() -> None:
    """An unknown platform raises."""
    with pytest.raises(ValueError, match="did you mean 'nginx'"):
        path_through(["ngimx"])


@pytest.mark.parametrize("seconds", [math.nan, 0, -1, math.inf, -math.inf])
@pytest.mark.parametrize("limit", ["idle_timeout", "max_lifetime", "grace"])
def test_invalid_hop_limit_is_rejected(limit: str, seconds: float) -> None:
    """A limit that is not a finite number above zero raises, in a path and in `check`."""
    message = f"{limit} must be a number of seconds above zero, not {seconds:g}"
    for look in (functools.partial(path_through, []), WebSocketConnectionManager().check):
        with pytest.raises(ValueError, match=message):
            look(**{limit: seconds})


@pytest.mark.parametrize("seconds", [math.nan, -1, math.inf])
def test_invalid_pre_stop_is_rejected(seconds: float) -> None:
    """A `pre_stop` that is negative or not finite raises."""
    with pytest.raises(ValueError, match="pre_stop must be a number of seconds, not"):
        WebSocketConnectionManager().check(pre_stop=seconds)


def test_options_without_server_are_rejected() -> None:
    """Server options without a known server raise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect_module, "running_server", lambda: None)
        with pytest.raises(ValueError, match="name of their server"):
            collect_context(WebSocketConfig(), None, CheckOptions(server_options={"reload": True}), refuses=False)


# ── manager ──


def test_manager_check_inspects_own_deployment(under: Any) -> None:
    """`check` inspects the options, the app, the given platform and the loaded server."""
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
    """A dependency that can reject a caller guards the stats router, on it, an outer router or the app."""
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
    """A start under an unsuitable server warns once."""
    under("granian")
    own, heard = manager_with()
    await own.start()
    own._loop = None
    await own.start()
    (event,) = heard.of("doctor_finding")
    assert event.level == logging.WARNING
    assert (event.fields["code"], event.fields["severity"]) == ("D10", "warning")
    assert "granian" in event.fields["problem"]
    assert "preStop" in event.fields["advice"]


@pytest.mark.parametrize(("in_worker", "codes"), [(True, ["D09"]), (False, [])])
async def test_start_under_hypercorn_detects_worker_process(
    manager_with: Any, under: Any, monkeypatch: pytest.MonkeyPatch, in_worker: bool, codes: list[str]
) -> None:
    """In a worker process of hypercorn, which gets no signal, a start warns; otherwise it does not."""
    under("hypercorn")
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: object() if in_worker else None)
    own, heard = manager_with()
    await own.start()
    assert [event.fields["code"] for event in heard.of("doctor_finding")] == codes


async def test_drain_secret_counts_as_drain_in_pre_stop(
    manager_with: Any, under: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A drain secret counts as a drain in `preStop`, which a process cannot see."""
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())
    for server in ("hypercorn", "granian"):
        under(server)
        own, heard = manager_with(drain_secret="a-secret-for-the-drain")
        await own.start()
        assert heard.of("doctor_finding") == []


@pytest.mark.parametrize("modules", [(), ("uvicorn",)])
async def test_clean_start_logs_nothing(manager_with: Any, under: Any, modules: tuple[str, ...]) -> None:
    """Under uvicorn, and under an unknown server, a start logs no finding."""
    under(*modules)
    own, heard = manager_with()
    await own.start()
    assert heard.of("doctor_finding") == []


async def test_failing_doctor_does_not_fail_start(
    manager_with: Any, under: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug in a check is reported, and the manager still starts."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError

    under("uvicorn")
    monkeypatch.setattr(collect_module, "run_checks", fail)
    own, heard = manager_with()
    await own.start()
    assert own.running
    (event,) = heard.of("doctor_failed")
    assert isinstance(event.error, ZeroDivisionError)


@pytest.mark.alone
async def test_start_checks_take_less_than_10_ms(manager_with: Any, under: Any) -> None:
    """The checks at a start take less than 10 ms, in the best of five runs."""
    under("granian")
    own, _ = manager_with()
    spent = []
    for _ in range(5):
        begun = time.perf_counter()
        collect_module.run_startup_checks(own.events, own.config, refuses=True, reported=set())
        spent.append(time.perf_counter() - begun)
    assert min(spent) < 0.01
