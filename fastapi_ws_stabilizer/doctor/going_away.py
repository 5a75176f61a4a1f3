"""The checks of going away, D07 to D10: who waits for whom, and how long."""

from __future__ import annotations

import math
from typing import Final

from fastapi_ws_stabilizer.doctor.findings import Problem
from fastapi_ws_stabilizer.doctor.surroundings import Surroundings

MARGIN: Final = 5.0
"""Seconds that are kept free before SIGKILL."""

ROOMY: Final = 30
"""Seconds that are advised for a server's own timeout, where nothing limits it."""


def shutdown_unbounded(s: Surroundings) -> Problem | None:
    """D07."""
    if s.server is None or not s.server.is_uvicorn or s.options is None:
        return None
    if s.option("timeout_graceful_shutdown") is not None:
        return None
    fitting = _left_for_server(s)
    advice = f"start it with --timeout-graceful-shutdown {fitting}"
    if fitting == ROOMY:
        advice += ", or with manager.uvicorn_options()"
    if s.server.name == "uvicorn-worker":
        advice = "gunicorn cannot set it: subclass UvicornWorker, with timeout_graceful_shutdown in its CONFIG_KWARGS"
    return Problem(
        "timeout_graceful_shutdown of uvicorn is not set: it waits for ever for an endpoint that goes on, the lifespan "
        "never ends, and the platform kills the process",
        advice,
    )


def _left_for_server(s: Surroundings) -> int:
    """Seconds for the server's own timeout that leave D08 content; `ROOMY` where there is enough."""
    grace = s.way.smallest("grace")
    if grace is None:
        return ROOMY
    return max(1, min(ROOMY, math.floor(grace.seconds - s.pre_stop - _drain(s) - MARGIN)))


def grace_too_short(s: Surroundings) -> Problem | None:
    """D08."""
    problems = [problem for problem in (_killed_by_master(s), _killed_by_platform(s)) if problem is not None]
    if not problems:
        return None
    return Problem("; and ".join(one.what for one in problems), "; and ".join(one.advice for one in problems))


def _drain(s: Surroundings) -> float:
    return s.config.drain_timeout if s.config.handle_signals else 0.0


def _killed_by_master(s: Surroundings) -> Problem | None:
    if s.server is None or not s.server.bounds_drain or (limit := s.option(s.server.graceful_timeout)) is None:
        return None
    if (drain := _drain(s)) <= limit:
        return None
    return Problem(
        f"the master of gunicorn kills its workers {limit:g} s after SIGTERM, the graceful_timeout, and the drain may "
        f"take drain_timeout {drain:g}",
        f"raise graceful_timeout to {drain:g} s or more, or shorten drain_timeout",
    )


def _killed_by_platform(s: Surroundings) -> Problem | None:
    grace = s.way.smallest("grace")
    if grace is None:
        return None
    drain, limit = _drain(s), None if s.server is None else s.option(s.server.graceful_timeout)
    if s.server is not None and s.server.bounds_drain and limit is not None:
        going, parts, shorten = limit, f"graceful_timeout {limit:g}, the drain included", "graceful_timeout"
    else:
        going = drain + (limit or 0.0)
        parts = f"drain_timeout {drain:g} + the server's own timeout {limit or 0.0:g}"
        shorten = "drain_timeout and the server's timeout"
    needed = s.pre_stop + going + MARGIN
    if needed <= grace.seconds:
        return None
    return Problem(
        f"the process is killed after the grace, {grace}, and going away may take {needed:g} s: preStop "
        f"{s.pre_stop:g} + {parts} + {MARGIN:g} to spare",
        f"raise it to {math.ceil(needed)} s, where that can be done, and tell the doctor so (--grace); or shorten "
        f"{shorten}",
    )


def hypercorn_never_stops(s: Surroundings) -> Problem | None:
    """D09."""
    if s.server is None or s.server.name != "hypercorn":
        return None
    workers = s.option("workers")
    if workers is None or s.pre_stop or s.config.drain_secret is not None:
        return None
    drained = s.config.handle_signals and workers == 0
    if s.python >= (3, 12) and not drained:
        return Problem(
            f"on Python {s.python[0]}.{s.python[1]} hypercorn does not stop while a WebSocket is open, whatever its "
            "graceful_timeout says, and nothing closes them at SIGTERM",
            "set drain_secret, and drain in preStop with `python -m fastapi_ws_stabilizer drain`; or run it with "
            "--workers 0",
        )
    if s.config.handle_signals and workers:
        return Problem(
            "the worker processes of hypercorn get no SIGTERM, so the drain never begins",
            "set drain_secret, and drain in preStop with `python -m fastapi_ws_stabilizer drain`; or run it with "
            "--workers 0",
        )
    return None


def drain_comes_too_late(s: Surroundings) -> Problem | None:
    """D10."""
    if s.server is None or s.server.name not in ("granian", "daphne"):
        return None
    if not s.config.handle_signals or s.pre_stop or s.config.drain_secret is not None:
        return None
    return Problem(
        f"handle_signals is on, and {s.server.name} cuts its sockets at SIGTERM before a drain can do much",
        "set drain_secret, and drain in preStop with `python -m fastapi_ws_stabilizer drain`",
    )
