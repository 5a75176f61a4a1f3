"""Collection of the deployment context, for a command, a call, or a starting manager."""

from __future__ import annotations

import logging
import math
import multiprocessing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.doctor.auth_middleware import unguarded_routes
from fastapi_ws_stabilizer.doctor.background_tasks import routes_with_background_tasks
from fastapi_ws_stabilizer.doctor.checks import run_checks
from fastapi_ws_stabilizer.doctor.context import DeploymentContext, unmanaged_routes, version_of
from fastapi_ws_stabilizer.doctor.dependency_order import routes_with_early_identity
from fastapi_ws_stabilizer.doctor.network_path import path_through
from fastapi_ws_stabilizer.doctor.open_stats import open_stats_routers
from fastapi_ws_stabilizer.doctor.servers import find_server, running_server, with_defaults
from fastapi_ws_stabilizer.events import EventBus
from fastapi_ws_stabilizer.handshake.routes import shadowed_routes
from fastapi_ws_stabilizer.platforms.platform import Platform
from fastapi_ws_stabilizer.servers.detect import websocket_library_advice


@dataclass(frozen=True)
class CheckOptions:
    """What the caller says about the deployment. `WebSocketConnectionManager.check` documents the fields."""

    server: str | None = None
    server_options: Mapping[str, Any] | None = None
    platform: str | Iterable[str] = ()
    idle_timeout: float | None = None
    max_lifetime: float | None = None
    grace: float | None = None
    pre_stop: float = 0.0
    http2: bool = False
    caching: bool = False


def collect_context(
    config: WebSocketConfig, app: Any, check_options: CheckOptions, *, refuses: bool, guarded: bool = False
) -> DeploymentContext:
    """Collect the context of the checks.

    Args:
        config: The options of the manager.
        app: The app with the routes to check.
        check_options: What the caller says about the deployment.
        refuses: Whether hooks reject connections before the accept.
        guarded: Whether hooks authenticate clients.

    Raises:
        ValueError: A server, an option or a platform is unknown, or a number is invalid.
    """
    server, server_options, pre_stop = check_options.server, check_options.server_options, check_options.pre_stop
    one = running_server() if server is None else find_server(server)
    options = None
    if one is not None and (server is not None or server_options is not None):
        options = with_defaults(one, server_options or {})
    elif server_options is not None:
        raise ValueError("server_options need the name of their server")
    if not 0 <= pre_stop < math.inf:
        raise ValueError(f"pre_stop must be a number of seconds, not {pre_stop:g}")
    platform = check_options.platform
    path = path_through(
        (platform,) if isinstance(platform, str) else platform,
        idle_timeout=check_options.idle_timeout,
        max_lifetime=check_options.max_lifetime,
        grace=check_options.grace,
    )
    if one is not None and options is not None and one.lifetime is not None and (options[one.lifetime] or 0) > 0:
        path = path.with_hop(Platform(one.name, one.name, (), max_lifetime=options[one.lifetime]))
    logins, unguarded = unguarded_routes(app)
    return DeploymentContext(
        config=config,
        server=one,
        options=options,
        version=() if one is None else version_of(one),
        network_path=path,
        pre_stop=pre_stop,
        http2=check_options.http2,
        caching=check_options.caching,
        bypassing=unmanaged_routes(app),
        refuses=refuses,
        guarded=guarded,
        logins=logins,
        unguarded=unguarded,
        early=routes_with_early_identity(app),
        shadowed=shadowed_routes(app),
        background=routes_with_background_tasks(app),
        open_stats=open_stats_routers(app),
    )


LIFESPAN_ADVICE: Final = (
    "no lifespan has started the manager: write FastAPI(lifespan=manager.lifespan), manager.install(app), "
    "or `async with manager.lifespan(app)` in a lifespan of your own; in tests, `with TestClient(app)`"
)


def run_startup_checks(
    events: EventBus,
    config: WebSocketConfig,
    app: Any = None,
    *,
    refuses: bool,
    guarded: bool = False,
    has_lifespan: bool = True,
    reported: set[str],
) -> None:
    """Run the checks that need only the process itself, and report each finding once.

    The checks never make a start fail, and an error in them is reported. All findings are warnings: the process already
    serves, and a problem may appear only at shutdown, on a rejection, or never.

    Args:
        events: The event bus for the reports.
        config: The options of the starting manager.
        app: The app of the manager, if it is known.
        refuses: Whether hooks reject connections before the accept.
        guarded: Whether hooks authenticate clients.
        has_lifespan: Whether a lifespan has started the manager, and not its first connection.
        reported: Codes that were reported already. The function adds to it.
    """
    if problem := websocket_library_advice():
        events.emit("websocket_library_missing", logging.ERROR, problem=problem)
    if not has_lifespan and "lifespan_missing" not in reported:
        reported.add("lifespan_missing")
        events.emit("lifespan_missing", logging.WARNING, advice=LIFESPAN_ADVICE)
    try:
        server = running_server()
        options = None
        if server is not None and server.name == "hypercorn":
            # With `--workers 0` this is no child process.
            options = {"workers": int(multiprocessing.parent_process() is not None)}
        logins, unguarded = unguarded_routes(app)
        context = DeploymentContext(
            config,
            server,
            options,
            refuses=refuses,
            guarded=guarded,
            logins=logins,
            unguarded=unguarded,
            early=routes_with_early_identity(app),
            shadowed=shadowed_routes(app),
            background=routes_with_background_tasks(app),
        )
        for finding in run_checks(context, at_start=True):
            if finding.code not in reported:
                reported.add(finding.code)
                events.emit(
                    "doctor_finding",
                    logging.WARNING,
                    code=finding.code,
                    severity=finding.severity,
                    problem=finding.problem,
                    advice=finding.advice,
                )
    except Exception as error:
        events.emit_exception("doctor_failed", error)
