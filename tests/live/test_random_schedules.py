"""Random schedules of valid and invalid clients and user code leave nothing behind, and each hook runs once."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.live.random_schedules import EXPECTED_BUG
from tests.support.server import ROOT, LiveServer

Serve = Callable[..., LiveServer]

SECONDS = 6.0
QUIESCENCE_TIMEOUT = 20.0
"""Seconds within which everything ends: session TTL, presence grace, the slowest user code, and a margin."""

CONFIG = {
    "disconnect_grace": 1.0,
    "heartbeat_interval": 0.3,
    "heartbeat_timeout": 0.6,
    "send_timeout": 1.0,
    "session_ttl": 1.0,
    "hello_timeout": 0.5,
    "presence_grace": 0.3,
    "max_connections": 22,
    "max_message_size": 100_000,
    "max_message_rate": 200,
    "max_memory_per_connection": 200_000,
    "max_total_memory": 1_500_000,
    "memory_check_interval": 0.2,
    "inbox_max_messages": 4,
    "inbox_pause_timeout": 1.0,
    "outbox_max_messages": 32,
    "outbox_max_bytes": 60_000,
    "max_lifetime": 3.0,
    "idle_timeout": 1.0,
    "room_history": 5,
    "max_bad_messages": 3,
    "log_level": "WARNING",
}

EACH_TIME = (("uvicorn-stable", "asyncio", True), ("uvicorn-sansio", "uvloop", False))
"""Combinations that run with every `make test`; the others run with the long tests."""

COMBINATIONS = [
    pytest.param(kind, loop, debug, id=f"{kind}-{loop}{'-debug' if debug else ''}", marks=marks)
    for kind in ("uvicorn-sansio", "uvicorn-wsproto", "uvicorn-stable")
    for loop in ("asyncio", "uvloop")
    for debug in (False, True)
    for marks in [() if (kind, loop, debug) in EACH_TIME else pytest.mark.soak]
]


EXPECTED_LINES = (EXPECTED_BUG, "division by zero", "UnicodeDecodeError: 'utf-8' codec")
"""Last lines of expected tracebacks: bugs of the app, and uvicorn's record of text that is not UTF-8."""

UVICORN_BUGS = ("in handle_parser_exception", "in send_receive_event_to_app")
"""Functions of uvicorn's sans-I/O protocol that raise at frames before the handshake response or after a close."""


def unexpected_tracebacks(log: str) -> list[str]:
    """Return the last line of each unexplained traceback, after the line before the traceback."""
    found: list[str] = []
    lines = log.splitlines()
    for number, line in enumerate(lines):
        if "Traceback (most recent call last)" not in line:
            continue
        indent = len(line) - len(line.lstrip(" |+-"))
        frames = ""
        for later in lines[number + 1 :]:
            if len(later) - len(later.lstrip(" |+-")) > indent or not later.strip(" |+-"):  # frames are indented
                frames += later
                continue
            is_ours = "fastapi_ws_stabilizer" in frames or not any(function in frames for function in UVICORN_BUGS)
            if is_ours and not any(expected in later for expected in EXPECTED_LINES):
                found.append(f"{lines[max(0, number - 1)]} -> {later}")
            break
    return found


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("kind", "loop", "debug"), COMBINATIONS)
async def test_random_schedules_leave_nothing_behind(serve: Serve, kind: str, loop: str, debug: bool) -> None:
    """At quiescence no task, registration, room, presence, session, reservation or memory is left."""
    seed = f"{kind}-{loop}-{debug}"
    env = {"TEST_SEED": seed, **({"PYTHONASYNCIODEBUG": "1"} if debug else {})}
    server = serve(kind, app="tests.live.random_schedules_app:app", config=CONFIG, args=("--loop", loop), env=env)
    clients = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.live.random_schedules", str(server.port), seed, str(SECONDS)),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )
    ends = time.monotonic() + SECONDS
    while time.monotonic() < ends:
        await asyncio.to_thread(server.post, "/broadcast")
        await asyncio.sleep(0.05)
    printed, _ = await asyncio.wait_for(clients.communicate(), 30)
    taken: dict[str, int] = json.loads(printed)

    deadline = time.monotonic() + QUIESCENCE_TIMEOUT
    state: dict[str, Any] = await asyncio.to_thread(server.get, "/state")
    while state["left"] and time.monotonic() < deadline:
        await asyncio.sleep(0.2)
        state = await asyncio.to_thread(server.get, "/state")
    log = server.log
    assert state["left"] == {}, log[-4000:]
    assert unexpected_tracebacks(log) == []
    assert "never retrieved" not in log
    assert "never awaited" not in log
    # The schedules reached connections, resumptions, and ends of many kinds.
    assert state["connects"] > 50, (state, taken)
    assert state["resumes"] > 0, (state, taken)
    assert len(state["endings"]) >= 6, (state, taken)
    assert server.terminate(10) < 10
