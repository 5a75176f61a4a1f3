"""Checks of the shutdown, D07 to D10: timeouts of the drain, the server and the platform."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.doctor.context import DeploymentContext
from fastapi_ws_stabilizer.doctor.findings import ERROR, WARNING, Problem
from fastapi_ws_stabilizer.doctor.network_path import GIVEN, HopLimit
from fastapi_ws_stabilizer.platforms.options import MAX_MARGIN, margin
from fastapi_ws_stabilizer.servers.uvicorn.options import shutdown_timeout

RECOMMENDED_TIMEOUT: Final = 30
"""Seconds that the doctor recommends for a server's own timeout if nothing limits it."""

DRAIN_PART: Final = 0.8
"""Fraction of the available time that the doctor recommends for a drain. The rest is for the server's own timeout."""

MIN_SHUTDOWN: Final = 2.0
"""Minimum time for a drain and the server after it, in seconds."""


def shutdown_unbounded(s: DeploymentContext) -> Problem | None:
    """Check D07."""
    if s.server is None or not s.server.is_uvicorn or s.options is None:
        return None
    if s.option("timeout_graceful_shutdown") is not None:
        return None
    grace = s.network_path.smallest("grace")
    room = (
        RECOMMENDED_TIMEOUT
        if grace is None
        else math.floor(min(RECOMMENDED_TIMEOUT, _available(s, grace.seconds) - _drain(s)))
    )
    if s.server.name == "uvicorn-worker":
        advice = "gunicorn cannot set it: subclass UvicornWorker, with timeout_graceful_shutdown in its CONFIG_KWARGS"
    elif grace is not None and room < 1:
        advice = _timeout_advice(s, grace)
    else:
        advice = f"start it with --timeout-graceful-shutdown {room}"
        if shutdown_timeout(s.config) <= room:
            advice += ", or with manager.uvicorn_options()"
    return Problem(
        "timeout_graceful_shutdown of uvicorn is not set: if an endpoint does not return, uvicorn waits for it "
        "indefinitely, the lifespan does not end, and the platform kills the process",
        advice,
    )


def _available(s: DeploymentContext, grace: float) -> float:
    """Return the seconds of a grace period for a drain and the server's own timeout together."""
    return grace - s.pre_stop - margin(grace)


def _timeout_advice(s: DeploymentContext, grace: HopLimit) -> str:
    """Return the options that D07 and D08 accept, or the advice to raise the grace period."""
    room = _available(s, grace.seconds)
    hops = [hop.name for hop in s.network_path.hops if hop.name != GIVEN]
    if grace.hop != GIVEN and _platform_needs(hops) <= room:
        names = ", ".join(f'"{name}"' for name in hops)
        return f"use WebSocketConfig.for_platform({names}) and manager.uvicorn_options(), which fit"
    if room < MIN_SHUTDOWN:
        needed = math.ceil(s.pre_stop + _drain(s) + RECOMMENDED_TIMEOUT + MAX_MARGIN)
        return f"raise the grace to {needed} s, and pass it as --grace"
    drain = math.floor(room * DRAIN_PART * 10) / 10
    server = max(1, math.floor(room - drain))
    return f"set drain_timeout={min(drain, room - server):g} and timeout_graceful_shutdown={server}"


def _platform_needs(hops: Sequence[str]) -> float:
    """Return the maximum seconds of drain and uvicorn with `for_platform` and `uvicorn_options`."""
    if not hops:
        return math.inf
    config = WebSocketConfig.for_platform(*hops)
    return config.drain_timeout + shutdown_timeout(config)


def grace_too_short(s: DeploymentContext) -> Problem | None:
    """Check D08."""
    problems = [problem for problem in (_killed_by_master(s), _killed_by_platform(s)) if problem is not None]
    if not problems:
        return None
    return Problem(
        "; and ".join(one.what for one in problems),
        "; and ".join(one.advice for one in problems),
        ERROR if any(one.severity == ERROR for one in problems) else WARNING,
    )


def _drain(s: DeploymentContext) -> float:
    return s.config.drain_timeout if s.config.handle_signals else 0.0


def _killed_by_master(s: DeploymentContext) -> Problem | None:
    if s.server is None or not s.server.bounds_drain or (limit := s.option(s.server.graceful_timeout)) is None:
        return None
    if (drain := _drain(s)) <= limit:
        return None
    return Problem(
        f"the master of gunicorn kills its workers {limit:g} s after SIGTERM (graceful_timeout), but "
        f"drain_timeout {drain:g} s allows a longer drain",
        f"raise graceful_timeout to {drain:g} s or more, or shorten drain_timeout",
    )


def _killed_by_platform(s: DeploymentContext) -> Problem | None:
    grace = s.network_path.smallest("grace")
    if grace is None:
        return None
    drain, limit = _drain(s), None if s.server is None else s.option(s.server.graceful_timeout)
    if s.server is not None and s.server.bounds_drain and limit is not None:
        duration, parts = limit, f"graceful_timeout {limit:g}, the drain included"
    else:
        duration = drain + (limit or 0.0)
        parts = f"drain_timeout {drain:g} + the server's own timeout {limit or 0.0:g}"
    reserve = margin(grace.seconds)
    needed = s.pre_stop + duration + reserve
    if needed <= grace.seconds:
        return None
    if s.server is not None and s.server.bounds_drain:
        shorter = "shorten drain_timeout and graceful_timeout"
    else:
        shorter = _timeout_advice(s, grace)
    raised = f"raise it to {math.ceil(needed)} s, if possible, and pass it as --grace"
    return Problem(
        f"the platform kills the process after its grace, {grace}, but a shutdown can take {needed:g} s: preStop "
        f"{s.pre_stop:g} + {parts} + reserve {reserve:g}",
        shorter if shorter.startswith("raise") else f"{shorter}; or {raised}",
        ERROR if _available(s, grace.seconds) <= 0 else WARNING,  # no time at all, or too little in the worst case
    )


def hypercorn_never_stops(s: DeploymentContext) -> Problem | None:
    """Check D09."""
    if s.server is None or s.server.name != "hypercorn":
        return None
    workers = s.option("workers")
    if workers is None or s.pre_stop or s.config.drain_secret is not None:
        return None
    drained = s.config.handle_signals and workers == 0
    if s.python >= (3, 12) and not drained:
        return Problem(
            f"on Python {s.python[0]}.{s.python[1]} hypercorn does not stop while a WebSocket is open, regardless of "
            "its graceful_timeout, and nothing closes WebSockets at SIGTERM",
            "set drain_secret, and drain in preStop with `python -m fastapi_ws_stabilizer drain`; or run it with "
            "--workers 0",
        )
    if s.config.handle_signals and workers:
        return Problem(
            "the worker processes of hypercorn get no SIGTERM, so the drain never starts",
            "set drain_secret, and drain in preStop with `python -m fastapi_ws_stabilizer drain`; or run it with "
            "--workers 0",
        )
    return None


def drain_starts_too_late(s: DeploymentContext) -> Problem | None:
    """Check D10."""
    if s.server is None or s.server.name not in ("granian", "daphne"):
        return None
    if not s.config.handle_signals or s.pre_stop or s.config.drain_secret is not None:
        return None
    return Problem(
        f"handle_signals is on, but {s.server.name} cuts its sockets at SIGTERM before the drain can finish",
        "set drain_secret, and drain in preStop with `python -m fastapi_ws_stabilizer drain`",
    )
