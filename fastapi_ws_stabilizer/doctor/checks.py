"""The checks D01 to D24. Each examines the deployment and returns a problem or `None`."""

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
    drain_starts_too_late,
    grace_too_short,
    hypercorn_never_stops,
    shutdown_unbounded,
)
from fastapi_ws_stabilizer.net.proxies import ANY_ADDRESS
from fastapi_ws_stabilizer.platforms.options import UPPER_BOUNDED_OPTIONS, derive_options
from fastapi_ws_stabilizer.platforms.registry import PLATFORMS

PART_OF_IDLE: Final = 0.75
"""Fraction of an idle timeout that the heartbeat interval should not exceed, because a heartbeat can be late."""

MIN_RECOMMENDED_INTERVAL: Final = 5.0
"""Minimum `heartbeat_interval` that the doctor recommends, in seconds. If even this interval is too long, the platform
needs a change."""

TOO_SHORT: Final[Mapping[str, Value]] = {
    "google-alb-classic": "max_lifetime",
    "azure-application-gateway": "idle_timeout",
}
"""Platforms with a default that no WebSocket survives, each with the limit to raise."""


MANY_CONNECTIONS: Final = 1000
"""Open connections from which a full garbage collection blocks the event loop for more than about 30 ms."""

NO_PROXIES: Final = frozenset({"aws-nlb", "azure-load-balancer", "kubernetes"})
"""Platforms that forward packets instead of requests. Behind them a server may see the addresses of clients."""


def _advised(s: DeploymentContext, option: str) -> float | None:
    """Return the value that `WebSocketConfig.for_platform` sets for these hops."""
    upper_bounds = {name: WebSocketConfig.model_fields[name].default for name in UPPER_BOUNDED_OPTIONS}
    return derive_options(s.network_path.hops, upper_bounds).get(option)


# ── idle time and lifetime ──


def _server_interval(s: DeploymentContext) -> float | None:
    """Return the seconds between the server's own pings to our connections; `None` without pings."""
    if s.server is None or (s.is_ours and s.config.heartbeat_type is HeartbeatType.PING):
        return None  # StableWebSocketProtocol sends no pings besides the heartbeat
    interval: float | None = s.option(s.server.ping_interval)
    return interval or None


def _heartbeat(s: DeploymentContext) -> tuple[float, str]:
    """Return the seconds between pings that keep an idle connection open, and their origin.

    If the heartbeat is on, only the heartbeat counts. The pings of the server do not, because another server may send
    none.
    """
    if s.config.heartbeat_type is not HeartbeatType.OFF:
        return s.config.heartbeat_interval, f"heartbeat_interval is {s.config.heartbeat_interval:g} s"
    interval = _server_interval(s)
    if s.server is None or interval is None:
        return math.inf, "heartbeat_type is off"
    return interval, f"heartbeat_type is off, and {s.server.name} pings every {interval:g} s"


def _interval_advice(s: DeploymentContext) -> str:
    interval = _advised(s, "heartbeat_interval") or 0.0
    if interval < MIN_RECOMMENDED_INTERVAL:
        return "raise the platform's idle timeout to 60 s or more: a heartbeat that fits it would be too frequent"
    return f"set heartbeat_interval={interval:g}, as WebSocketConfig.for_platform does, or raise that timeout"


def heartbeat_exceeds_idle_timeout(s: DeploymentContext) -> Problem | None:
    """Check D01."""
    seconds, what = _heartbeat(s)
    idle = s.network_path.smallest("idle_timeout")
    if idle is None or seconds < idle.seconds:
        return None
    return Problem(
        f"{what}: the idle timeout, {idle}, cuts idle connections without a close frame", _interval_advice(s)
    )


def heartbeat_near_idle_timeout(s: DeploymentContext) -> Problem | None:
    """Check D02."""
    seconds, what = _heartbeat(s)
    idle = s.network_path.smallest("idle_timeout")
    if idle is None or not PART_OF_IDLE * idle.seconds < seconds < idle.seconds:
        return None
    return Problem(
        f"{what}, more than {PART_OF_IDLE:.0%} of the idle timeout, {idle}: one late heartbeat loses a connection",
        _interval_advice(s),
    )


def lifetime_over_platform(s: DeploymentContext) -> Problem | None:
    """Check D03."""
    limit = s.network_path.smallest("max_lifetime")
    ours = s.config.max_lifetime
    if limit is None or (ours is not None and ours < limit.seconds):
        return None
    current = "max_lifetime is not set" if ours is None else f"max_lifetime is {ours:g} s"
    return Problem(
        f"{current}, and the platform cuts connections after {limit}, even busy ones",
        f"set max_lifetime={_advised(s, 'max_lifetime'):g}, as WebSocketConfig.for_platform does: the server then asks "
        "clients to reconnect before the cut",
    )


def platform_default_too_short(s: DeploymentContext) -> Problem | None:
    """Check D04."""
    for name, value in TOO_SHORT.items():
        limit = s.network_path.smallest(value)
        if limit is not None and limit.hop == name:
            return Problem(
                f"the default timeout, {limit}, ends WebSockets, and a heartbeat may not prevent that",
                "raise it to 3600 s or more, and pass the new value: --idle-timeout 3600, or --max-lifetime 3600",
            )
    return None


def no_keepalive(s: DeploymentContext) -> Problem | None:
    """Check D05."""
    if s.config.heartbeat_type is not HeartbeatType.OFF or s.server is None or s.options is None:
        return None
    if _server_interval(s) is not None:
        return None
    return Problem(
        f"heartbeat_type is off, and {s.server.name} sends no pings: dead connections stay open, and idle ones are cut",
        "set heartbeat_type to 'ping', the default"
        + (f", or set {s.server.ping_interval} of {s.server.name}" if s.server.ping_interval else ""),
    )


# ── routes and server ──


def unread_routes(s: DeploymentContext) -> Problem | None:
    """Check D06."""
    ws = s.option("ws")
    if s.server is None or not s.server.is_uvicorn or not s.bypassing or ws in (None, "websockets", "none"):
        return None
    if ws == "auto" and s.server.name == "uvicorn" and s.version and s.version < (0, 50):
        return None  # `auto` selected `websockets`, which reads ahead
    interval = s.option("ws_ping_interval")
    if not interval:
        return None
    dead = interval + (s.option("ws_ping_timeout") or 0.0)
    return Problem(
        f"{', '.join(s.bypassing)}: this library does not serve the route. uvicorn stops reading such a socket while "
        f"one message waits for the endpoint, misses the pong, and closes it with 1011 after {dead:g} s",
        "take ws: StableSocketDep in the endpoint; or make sure that it always reads, and ignore this check",
    )


def concurrency_limited(s: DeploymentContext) -> Problem | None:
    """Check D11."""
    if s.server is None or not (limit := s.option("limit_concurrency")):
        return None
    return Problem(
        f"limit_concurrency={limit} of uvicorn rejects no WebSockets but counts them: with {limit} of them open, the "
        "health check gets 503",
        "remove limit_concurrency",
    )


def workers_recycled(s: DeploymentContext) -> Problem | None:
    """Check D12."""
    if s.server is None:
        return None
    on = [f"{name}={s.option(name)}" for name in s.server.recyclers if s.option(name)]
    if not on:
        return None
    return Problem(
        f"{', '.join(on)} of {s.server.name} ends healthy workers, and all their sockets at once",
        "remove it from servers of WebSockets",
    )


def rejection_status_lost(s: DeploymentContext) -> Problem | None:
    """Check D13."""
    if s.server is None or s.server.sends_denials or not s.refuses:
        return None
    return Problem(
        f"on_handshake hooks reject connections, but {s.server.name} cannot send their status: clients see 403 or 500",
        "reject in on_connect, which closes with 4000 + the status; or use another server",
    )


def close_codes_not_sent(s: DeploymentContext) -> Problem | None:
    """Check D14."""
    if s.server is None or s.server.sends_every_code:
        return None
    codes = sorted({rule.code for rule in CLOSE_POLICIES.values() if 1000 < rule.code < 3000} - UNSENDABLE)
    return Problem(
        f"{s.server.name} raises an error for close codes other than 1000 and 3000 to 4999, but this library sends "
        f"{', '.join(map(str, codes))}",
        "use another server",
    )


def unauthenticated_route(s: DeploymentContext) -> Problem | None:
    """Check D17."""
    if not s.logins or not s.unguarded or s.guarded:
        return None
    return Problem(
        f"{', '.join(s.logins)}: HTTP middleware that looks like a login. It does not run for WebSockets, and "
        f"{', '.join(s.unguarded)} does not authenticate its clients",
        "take the client id from a dependency, Depends(manager.socket_for(current_user)); if all clients may connect, "
        "register an on_handshake hook",
    )


def proxies_not_trusted(s: DeploymentContext) -> Problem | None:
    """Check D18."""
    limits = [
        f"{option}={limit:g}"
        for option, limit in (
            ("max_connections_per_address", s.config.max_connections_per_address),
            ("max_connect_rate_per_address", s.config.max_connect_rate_per_address),
        )
        if limit is not None
    ]
    if ANY_ADDRESS in s.config.trusted_proxies:
        if not limits:
            return None
        return Problem(
            f"trusted_proxies contains '*', so a client can forge its address and evade {', '.join(limits)}",
            "set it to the addresses or networks of the proxies",
        )
    hops = [hop.name for hop in s.network_path.hops if hop.name in PLATFORMS and hop.name not in NO_PROXIES]
    if s.config.trusted_proxies or not hops:
        return None
    effect = f"all clients share {', '.join(limits)}" if limits else "logs and stats show it for every client"
    return Problem(
        f"{', '.join(hops)} forwards requests to the server, and trusted_proxies is empty: the server sees the "
        f"proxy's address, and {effect}",
        "set trusted_proxies to the addresses or networks of the proxies, as in WebSocketConfig.for_platform(..., "
        "trusted_proxies=['10.0.0.0/8']); if the server replaces the proxy's address by the client's, as uvicorn does "
        "with --forwarded-allow-ips, ignore this check",
    )


def stats_without_guard(s: DeploymentContext) -> Problem | None:
    """Check D21."""
    if not s.open_stats:
        return None
    return Problem(
        f"{', '.join(s.open_stats)}: the stats router answers every caller, with client ids and addresses",
        "include it with a dependency that rejects callers: app.include_router(stats_router, prefix=..., "
        "dependencies=[Depends(admin)]); if a proxy restricts access, ignore this check",
    )


def workers_without_secret(s: DeploymentContext) -> Problem | None:
    """Check D22."""
    workers = s.option("workers")
    if not workers or workers < 2 or s.config.reconnect_secret is not None:
        return None
    return Problem(
        f"workers={workers}, and reconnect_secret is not set: each worker creates its own secret, so it rejects the "
        "reconnect tokens and tickets of the others",
        "set reconnect_secret, or WS_RECONNECT_SECRET; rooms, broadcasts and sessions still stay within one worker, so "
        "configure the load balancer to route a client to the same worker",
    )


def identity_runs_before_socket(s: DeploymentContext) -> Problem | None:
    """Check D19."""
    if not s.early:
        return None
    return Problem(
        f"{', '.join(s.early)} runs the identity dependency before manager.socket_for. It rejects clients with an HTTP "
        "status, which browsers cannot read; it runs before the Origin check, cannot read the first frame, and its "
        "rejections are not counted",
        "put the socket first among the endpoint's parameters, and remove the identity from the dependencies= of the "
        "routes, routers and app that have WebSockets; ws.identity is its result",
    )


def routes_never_reached(s: DeploymentContext) -> Problem | None:
    """Check D20."""
    if not s.shadowed:
        return None
    routes = "; ".join(f"{path} is never reached, because {by} comes before it" for path, by in s.shadowed)
    return Problem(
        f"{routes}: clients get that route's answer, such as 403",
        "declare WebSocket routes first, a fixed path before one with a parameter, and mount static files last",
    )


def background_tasks_never_run(s: DeploymentContext) -> Problem | None:
    """Check D23."""
    if not s.background:
        return None
    return Problem(
        f"{', '.join(s.background)} takes BackgroundTasks, which FastAPI runs after an HTTP response. A WebSocket has "
        "no response, so no task added there ever runs",
        "await the work in the endpoint, or use ws.create_task(work()), which is cancelled when the connection ends; "
        "put work for the time after the connection into an on_disconnect hook",
    )


def collector_not_paced(s: DeploymentContext) -> Problem | None:
    """Check D24."""
    most = s.config.max_connections
    if s.config.gc_pacing != "off" or (most is not None and most < MANY_CONNECTIONS):
        return None
    limit = "no max_connections limits the open connections" if most is None else f"max_connections is {most}"
    return Problem(
        f"gc_pacing is off, and {limit}: with 10,000 of them, a full garbage collection blocks the event loop for "
        "hundreds of milliseconds, several times while clients connect",
        f'use the default, gc_pacing="auto"; or set max_connections below {MANY_CONNECTIONS}; if your app paces the '
        "collector itself, ignore this check",
    )


# ── platforms ──


def platform_unsupported(s: DeploymentContext) -> Problem | None:
    """Check D15."""
    if not s.network_path.unsupported:
        return None
    return Problem(
        "; ".join(f"{hop}: {why}" for hop, why in s.network_path.unsupported),
        "deploy to a platform that supports WebSockets",
    )


def platform_settings_block_websockets(s: DeploymentContext) -> Problem | None:
    """Check D16."""
    if s.http2 and s.network_path.has("google-cloud-run"):
        return Problem(
            "HTTP/2 end to end is on, and Cloud Run does not pass WebSockets over it",
            "turn it off: `gcloud run services update SERVICE --no-use-http2`",
        )
    if s.caching and s.network_path.has("azure-front-door"):
        return Problem(
            "the Front Door route has caching on, which blocks WebSockets", "turn off caching for this route"
        )
    return None


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        code: Stable code.
        severity: Severity of its findings.
        title: The broken rule, in a few words.
        look: Function that returns the problem, or `None`.
        at_start: Whether a manager runs it at startup, because it needs only the process itself.
    """

    code: str
    severity: Severity
    title: str
    look: Callable[[DeploymentContext], Problem | None]
    at_start: bool = False


CHECKS: Final = (
    Check("D01", ERROR, "Heartbeat slower than an idle timeout", heartbeat_exceeds_idle_timeout),
    Check("D02", WARNING, "Heartbeat close to an idle timeout", heartbeat_near_idle_timeout),
    Check("D03", ERROR, "Connection lifetime exceeds the platform's limit", lifetime_over_platform),
    Check("D04", ERROR, "Platform's default timeout too short for WebSockets", platform_default_too_short),
    Check("D05", ERROR, "No keepalive", no_keepalive),
    Check("D06", WARNING, "WebSocket route not read while its endpoint is busy", unread_routes),
    Check("D07", WARNING, "Server shutdown without a timeout", shutdown_unbounded),
    Check("D08", WARNING, "Shutdown can exceed the platform's grace", grace_too_short),
    Check("D09", ERROR, "hypercorn does not stop, or does not drain", hypercorn_never_stops, at_start=True),
    Check("D10", WARNING, "Drain at SIGTERM starts too late", drain_starts_too_late, at_start=True),
    Check("D11", WARNING, "WebSockets exhaust limit_concurrency", concurrency_limited),
    Check("D12", WARNING, "Server recycles workers", workers_recycled),
    Check("D13", WARNING, "Server cannot send the status of a rejection", rejection_status_lost, at_start=True),
    Check("D14", ERROR, "Server cannot send the close codes", close_codes_not_sent, at_start=True),
    Check("D15", ERROR, "Platform does not support WebSockets", platform_unsupported),
    Check("D16", ERROR, "Platform settings block WebSockets", platform_settings_block_websockets),
    Check("D17", WARNING, "WebSocket route without authentication", unauthenticated_route, at_start=True),
    Check("D18", WARNING, "Per-IP limits see only the proxy's address", proxies_not_trusted),
    Check(
        "D19",
        WARNING,
        "Identity dependency runs before the socket dependency",
        identity_runs_before_socket,
        at_start=True,
    ),
    Check("D20", ERROR, "WebSocket route is never reached", routes_never_reached, at_start=True),
    Check("D21", WARNING, "Stats router without authentication", stats_without_guard),
    Check("D22", WARNING, "Workers do not share a secret", workers_without_secret),
    Check("D23", ERROR, "BackgroundTasks of a WebSocket never run", background_tasks_never_run, at_start=True),
    Check("D24", WARNING, "Garbage collector stalls many connections", collector_not_paced),
)
"""All checks, ordered by code."""


def run_checks(context: DeploymentContext, *, at_start: bool = False) -> list[Finding]:
    """Run all checks, or those for a starting manager; return the findings ordered by code."""
    findings = []
    for check in CHECKS:
        if at_start and not check.at_start:
            continue
        if (problem := check.look(context)) is not None:
            severity = problem.severity or check.severity
            findings.append(Finding(check.code, severity, check.title, problem.what, problem.advice))
    return findings
