"""The checks D01 to D23: each looks at the surroundings and says what is wrong with them, or nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from fastapi_ws_stabilizer.close_codes import CLOSE_POLICIES, UNSENDABLE
from fastapi_ws_stabilizer.config import HeartbeatType, WebSocketConfig
from fastapi_ws_stabilizer.doctor.context import DeploymentContext
from fastapi_ws_stabilizer.doctor.findings import ERROR, WARNING, Finding, Problem, Severity
from fastapi_ws_stabilizer.doctor.network_path import Value
from fastapi_ws_stabilizer.doctor.shutdown_checks import (
    drain_comes_too_late,
    grace_too_short,
    hypercorn_never_stops,
    shutdown_unbounded,
)
from fastapi_ws_stabilizer.net.proxies import ANY_ADDRESS
from fastapi_ws_stabilizer.platforms.options import UPPER_BOUNDED_OPTIONS, derive_options
from fastapi_ws_stabilizer.platforms.registry import PLATFORMS

PART_OF_IDLE: Final = 0.75
"""The part of an idle timeout within which two beats should follow each other: a beat can be late."""

HOTTEST: Final = 5.0
"""The shortest `heartbeat_interval`, in seconds, that is advised. Where it is too long, the platform has to change."""

TOO_SHORT: Final[Mapping[str, Value]] = {
    "google-alb-classic": "max_lifetime",
    "azure-application-gateway": "idle_timeout",
}
"""Platforms by whose default no WebSocket can live, each with the limit that has to be raised."""


NO_PROXIES: Final = frozenset({"aws-nlb", "azure-load-balancer", "kubernetes"})
"""Platforms that pass packets on and not requests: behind them a server may see the addresses of clients."""


def _advised(s: DeploymentContext, option: str) -> float | None:
    """What `WebSocketConfig.for_platform` would set for these hops."""
    most = {name: WebSocketConfig.model_fields[name].default for name in UPPER_BOUNDED_OPTIONS}
    return derive_options(s.network_path.hops, most).get(option)


# ── how long nothing passes ──


def _server_interval(s: DeploymentContext) -> float | None:
    """Seconds between two pings that the server sends of its own to our connections; `None` if it sends none."""
    if s.server is None or (s.is_ours and s.config.heartbeat_type is HeartbeatType.PING):
        return None  # StableWebSocketProtocol leaves the pings to the heartbeat
    interval: float | None = s.option(s.server.ping_interval)
    return interval or None


def _beat(s: DeploymentContext) -> tuple[float, str]:
    """Seconds between two beats that are meant to keep an idle connection, and what makes them.

    With the heartbeat on, that is the heartbeat, though pings of the server may pass as well: they go with the server.
    """
    if s.config.heartbeat_type is not HeartbeatType.OFF:
        return s.config.heartbeat_interval, f"heartbeat_interval is {s.config.heartbeat_interval:g} s"
    interval = _server_interval(s)
    if s.server is None or interval is None:
        return math.inf, "heartbeat_type is off"
    return interval, f"heartbeat_type is off, and {s.server.name} pings every {interval:g} s"


def _quicker(s: DeploymentContext) -> str:
    interval = _advised(s, "heartbeat_interval") or 0.0
    if interval < HOTTEST:
        return "raise the platform's idle timeout to 60 s or more: a heartbeat that fits it would be too hot"
    return f"set heartbeat_interval={interval:g}, as WebSocketConfig.for_platform does, or raise that timeout"


def heartbeat_exceeds_idle_timeout(s: DeploymentContext) -> Problem | None:
    """D01."""
    seconds, what = _beat(s)
    idle = s.network_path.smallest("idle_timeout")
    if idle is None or seconds < idle.seconds:
        return None
    return Problem(f"{what}: idle connections are cut by the idle timeout, {idle}, without a close frame", _quicker(s))


def heartbeat_near_idle_timeout(s: DeploymentContext) -> Problem | None:
    """D02."""
    seconds, what = _beat(s)
    idle = s.network_path.smallest("idle_timeout")
    if idle is None or not PART_OF_IDLE * idle.seconds < seconds < idle.seconds:
        return None
    return Problem(
        f"{what}, more than {PART_OF_IDLE:.0%} of the idle timeout, {idle}: one late beat loses a connection",
        _quicker(s),
    )


def lifetime_over_platform(s: DeploymentContext) -> Problem | None:
    """D03."""
    limit = s.network_path.smallest("max_lifetime")
    ours = s.config.max_lifetime
    if limit is None or (ours is not None and ours < limit.seconds):
        return None
    said = "max_lifetime is not set" if ours is None else f"max_lifetime is {ours:g} s"
    return Problem(
        f"connections are cut after {limit}, however busy they are, and {said}",
        f"set max_lifetime={_advised(s, 'max_lifetime'):g}, as WebSocketConfig.for_platform does: clients are asked to "
        "come back before they are cut",
    )


def platform_default_too_short(s: DeploymentContext) -> Problem | None:
    """D04."""
    for name, value in TOO_SHORT.items():
        limit = s.network_path.smallest(value)
        if limit is not None and limit.hop == name:
            return Problem(
                f"WebSockets end by the default timeout, {limit}, for which a heartbeat is no help, or not for sure",
                "raise it to 3600 s or more, and tell the doctor so: --idle-timeout 3600, or --max-lifetime 3600",
            )
    return None


def no_keepalive(s: DeploymentContext) -> Problem | None:
    """D05."""
    if s.config.heartbeat_type is not HeartbeatType.OFF or s.server is None or s.options is None:
        return None
    if _server_interval(s) is not None:
        return None
    return Problem(
        f"heartbeat_type is off, and {s.server.name} sends no pings: dead clients are not found, idle ones are cut",
        "leave heartbeat_type at 'ping'"
        + (f", or set {s.server.ping_interval} of {s.server.name}" if s.server.ping_interval else ""),
    )


# ── routes and server ──


def unread_routes(s: DeploymentContext) -> Problem | None:
    """D06."""
    ws = s.option("ws")
    if s.server is None or not s.server.is_uvicorn or not s.bypassing or ws in (None, "websockets", "none"):
        return None
    if ws == "auto" and s.server.name == "uvicorn" and s.version and s.version < (0, 50):
        return None  # `auto` was `websockets`, which reads ahead
    interval = s.option("ws_ping_interval")
    if not interval:
        return None
    dead = interval + (s.option("ws_ping_timeout") or 0.0)
    return Problem(
        f"{', '.join(s.bypassing)}: not served by this library. uvicorn stops reading such a socket at one message "
        f"that its endpoint has not taken, misses the pong, and closes it with 1011 after {dead:g} s",
        "take ws: StableSocketDep in the endpoint; or see to it that it always reads, and leave this check out",
    )


def concurrency_limited(s: DeploymentContext) -> Problem | None:
    """D11."""
    if s.server is None or not (limit := s.option("limit_concurrency")):
        return None
    return Problem(
        f"limit_concurrency={limit} of uvicorn refuses no WebSocket but counts them: with {limit} of them open the "
        "health check gets 503",
        "leave it out",
    )


def workers_recycled(s: DeploymentContext) -> Problem | None:
    """D12."""
    if s.server is None:
        return None
    on = [f"{name}={s.option(name)}" for name in s.server.recyclers if s.option(name)]
    if not on:
        return None
    return Problem(
        f"{', '.join(on)} of {s.server.name} ends workers while all is well, with all their sockets at once",
        "leave it out where WebSockets are served",
    )


def rejection_status_lost(s: DeploymentContext) -> Problem | None:
    """D13."""
    if s.server is None or s.server.sends_denials or not s.refuses:
        return None
    return Problem(
        f"on_handshake hooks refuse connections, and {s.server.name} cannot send their status: clients see 403 or 500",
        "refuse in on_connect, which closes with 4000 + the status; or use another server",
    )


def close_codes_not_sent(s: DeploymentContext) -> Problem | None:
    """D14."""
    if s.server is None or s.server.sends_every_code:
        return None
    codes = sorted({rule.code for rule in CLOSE_POLICIES.values() if 1000 < rule.code < 3000} - UNSENDABLE)
    return Problem(
        f"{s.server.name} raises an error for each close code but 1000 and 3000 to 4999, and this library sends "
        f"{', '.join(map(str, codes))}",
        "use another server",
    )


def sockets_beside_a_login(s: DeploymentContext) -> Problem | None:
    """D17."""
    if not s.logins or not s.unguarded or s.guarded:
        return None
    return Problem(
        f"{', '.join(s.logins)}: HTTP middleware that looks like a login. It does not run for WebSockets, and "
        f"{', '.join(s.unguarded)} asks nobody who it is",
        "take the client id from a dependency, Depends(manager.socket_for(current_user)); where everybody may come, "
        "say so with an on_handshake hook",
    )


def proxies_not_trusted(s: DeploymentContext) -> Problem | None:
    """D18."""
    limits = [
        f"{option}={most:g}"
        for option, most in (
            ("max_connections_per_address", s.config.max_connections_per_address),
            ("max_connect_rate_per_address", s.config.max_connect_rate_per_address),
        )
        if most is not None
    ]
    if ANY_ADDRESS in s.config.trusted_proxies:
        if not limits:
            return None
        return Problem(
            f"trusted_proxies holds '*', so a client can write its address itself and evade {', '.join(limits)}",
            "name the addresses and networks of the proxies",
        )
    hops = [hop.name for hop in s.network_path.hops if hop.name in PLATFORMS and hop.name not in NO_PROXIES]
    if s.config.trusted_proxies or not hops:
        return None
    effect = f"all clients share {', '.join(limits)}" if limits else "logs and stats show it for every client"
    return Problem(
        f"{', '.join(hops)} stands before the server, and trusted_proxies is empty: the server sees the "
        f"proxy's address, and {effect}",
        "set trusted_proxies to the addresses or networks of the proxies, as in WebSocketConfig.for_platform(..., "
        "trusted_proxies=['10.0.0.0/8']); where the server is told to put the client's address in the place of its "
        "proxy's, as by uvicorn's --forwarded-allow-ips, leave this check out",
    )


def stats_without_guard(s: DeploymentContext) -> Problem | None:
    """D21."""
    if not s.open_stats:
        return None
    return Problem(
        f"{', '.join(s.open_stats)}: the stats router answers every caller, with client ids and addresses",
        "include it with a dependency that rejects callers: app.include_router(stats_router, prefix=..., "
        "dependencies=[Depends(admin)]); where a proxy keeps callers out, leave this check out",
    )


def workers_without_secret(s: DeploymentContext) -> Problem | None:
    """D22."""
    workers = s.option("workers")
    if not workers or workers < 2 or s.config.reconnect_secret is not None:
        return None
    return Problem(
        f"workers={workers}, and reconnect_secret is not set: each worker makes its own, so it rejects the reconnect "
        "tokens and tickets of the others",
        "set reconnect_secret, or WS_RECONNECT_SECRET; rooms, broadcasts and sessions still stay within one worker, so "
        "let the load balancer send a client back to its worker",
    )


def identity_runs_before_socket(s: DeploymentContext) -> Problem | None:
    """D19."""
    if not s.early:
        return None
    return Problem(
        f"{', '.join(s.early)} asks who comes before manager.socket_for does: who is refused there is told by HTTP, "
        "which a browser cannot read, is not counted, was not asked for its Origin, and has no first message",
        "put the socket first among the endpoint's parameters, and take the identity out of the dependencies= of the "
        "routes, routers and app that sockets belong to; ws.identity is what it returned",
    )


def routes_never_reached(s: DeploymentContext) -> Problem | None:
    """D20."""
    if not s.shadowed:
        return None
    routes = "; ".join(f"{path} is never reached, because {by} stands before it" for path, by in s.shadowed)
    return Problem(
        f"{routes}: its clients get what that answers, such as 403",
        "declare WebSocket routes first, a fixed path before one with a parameter, and mount static files last",
    )


def background_tasks_never_run(s: DeploymentContext) -> Problem | None:
    """D23."""
    if not s.background:
        return None
    return Problem(
        f"{', '.join(s.background)} takes BackgroundTasks, which FastAPI runs after an HTTP response: a WebSocket has "
        "none, so that no task added there ever runs",
        "await the work in the endpoint, or write ws.create_task(work()), which is cancelled when the connection ends; "
        "work for the time after the connection belongs into an on_disconnect hook",
    )


# ── platforms ──


def platform_hosts_no_sockets(s: DeploymentContext) -> Problem | None:
    """D15."""
    if not s.network_path.unsupported:
        return None
    return Problem(
        "; ".join(f"{hop}: {why}" for hop, why in s.network_path.unsupported), "deploy to something that holds sockets"
    )


def platform_breaks_the_upgrade(s: DeploymentContext) -> Problem | None:
    """D16."""
    if s.http2 and s.network_path.has("google-cloud-run"):
        return Problem(
            "HTTP/2 end to end is on, over which Cloud Run passes no WebSocket",
            "switch it off: `gcloud run services update SERVICE --no-use-http2`",
        )
    if s.caching and s.network_path.has("azure-front-door"):
        return Problem("the Front Door route caches, and passes no WebSocket then", "switch caching off for this route")
    return None


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        code: Its stable name.
        severity: How bad it is.
        title: The rule, in a few words.
        look: Finds the problem, if there is one.
        at_start: Whether a manager makes it when it starts: what a running process knows is enough for it.
    """

    code: str
    severity: Severity
    title: str
    look: Callable[[DeploymentContext], Problem | None]
    at_start: bool = False


CHECKS: Final = (
    Check("D01", ERROR, "The heartbeat is slower than an idle timeout", heartbeat_exceeds_idle_timeout),
    Check("D02", WARNING, "The heartbeat is close to an idle timeout", heartbeat_near_idle_timeout),
    Check("D03", ERROR, "A connection lasts longer than the platform lets it", lifetime_over_platform),
    Check("D04", ERROR, "The platform's default timeout has to be raised", platform_default_too_short),
    Check("D05", ERROR, "Nobody pings", no_keepalive),
    Check("D06", WARNING, "A WebSocket route is not read while its endpoint is busy", unread_routes),
    Check("D07", WARNING, "The server's shutdown has no bound", shutdown_unbounded),
    Check("D08", WARNING, "A shutdown can take longer than the platform waits", grace_too_short),
    Check("D09", ERROR, "hypercorn does not stop, or does not drain", hypercorn_never_stops, at_start=True),
    Check("D10", WARNING, "The drain at SIGTERM comes too late", drain_comes_too_late, at_start=True),
    Check("D11", WARNING, "WebSockets use up limit_concurrency", concurrency_limited),
    Check("D12", WARNING, "Workers are recycled", workers_recycled),
    Check("D13", WARNING, "Refusals lose their status", rejection_status_lost, at_start=True),
    Check("D14", ERROR, "The server cannot send the close codes", close_codes_not_sent, at_start=True),
    Check("D15", ERROR, "The platform cannot host WebSockets", platform_hosts_no_sockets),
    Check("D16", ERROR, "The platform is set up so that no WebSocket passes", platform_breaks_the_upgrade),
    Check("D17", WARNING, "A login does not guard a WebSocket route", sockets_beside_a_login, at_start=True),
    Check("D18", WARNING, "The addresses of clients are those of a proxy", proxies_not_trusted),
    Check("D19", WARNING, "Who comes is asked before the socket", identity_runs_before_socket, at_start=True),
    Check("D20", ERROR, "A WebSocket route is never reached", routes_never_reached, at_start=True),
    Check("D21", WARNING, "The stats router has no guard", stats_without_guard),
    Check("D22", WARNING, "Workers do not share a secret", workers_without_secret),
    Check("D23", ERROR, "BackgroundTasks of a WebSocket never run", background_tasks_never_run, at_start=True),
)
"""All checks, in order."""


def run_checks(surroundings: DeploymentContext, *, at_start: bool = False) -> list[Finding]:
    """Make all checks, or those that a manager makes when it starts; return what they found, in order."""
    findings = []
    for check in CHECKS:
        if at_start and not check.at_start:
            continue
        if (problem := check.look(surroundings)) is not None:
            severity = problem.severity or check.severity
            findings.append(Finding(check.code, severity, check.title, problem.what, problem.advice))
    return findings
