"""Property: an exception in any call of the teardown does not stop the teardown."""

from __future__ import annotations

import ast
import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fastapi_ws_stabilizer
from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.connection.asgi_outbox import AsgiOutbox
from fastapi_ws_stabilizer.connection.connection import Connection
from fastapi_ws_stabilizer.connection.credential_expiry import CredentialExpiry
from fastapi_ws_stabilizer.connection.direct_outbox import DirectOutbox
from fastapi_ws_stabilizer.connection.endpoint import EndpointTask
from fastapi_ws_stabilizer.connection.inbox import Inbox
from fastapi_ws_stabilizer.connection.server_transport import ServerTransport
from fastapi_ws_stabilizer.connection.teardown import Teardown
from fastapi_ws_stabilizer.handlers.hooks import HookRegistry
from fastapi_ws_stabilizer.hub.heartbeat import HeartbeatScheduler
from fastapi_ws_stabilizer.hub.hub import Hub
from fastapi_ws_stabilizer.hub.presence import PresenceTracker
from fastapi_ws_stabilizer.hub.reaper import ConnectionReaper
from fastapi_ws_stabilizer.hub.registry import ClosingConnections, ConnectionRegistry
from fastapi_ws_stabilizer.limits.connections import Reservation
from fastapi_ws_stabilizer.memory.budget import MemoryBudget
from fastapi_ws_stabilizer.node import Node
from fastapi_ws_stabilizer.scheduling import FlushScheduler
from fastapi_ws_stabilizer.session_lifecycle import SessionLifecycle
from fastapi_ws_stabilizer.sessions.ended_sessions import EndedSessions
from fastapi_ws_stabilizer.sessions.reconnect_tokens import ReconnectTokenRegistry
from fastapi_ws_stabilizer.sessions.session import Session
from fastapi_ws_stabilizer.sessions.store import SessionStore
from fastapi_ws_stabilizer.sessions.v1_protocol import V1Protocol
from fastapi_ws_stabilizer.socket import StableSocket
from fastapi_ws_stabilizer.wire.v1.frames import SUBPROTOCOL
from tests.support.fake_link import soon, virtually
from tests.support.stage import Line, Stage
from tests.unit.connection.test_direct_transport import LinkServer

PACKAGE = Path(fastapi_ws_stabilizer.__file__).parent

TEARDOWN = {
    "connection/connection.py": (
        "_start_closing",
        "mark_closing",
        "close_inbox",
        "run_disconnect_hooks",
        "abort",
        "stop_reading",
        "close_unread",
        "cancel_tasks",
        "release",
    ),
    "connection/teardown.py": (
        "start",
        "_close_outbox",
        "_mark_websocket_disconnected",
        "_run",
        "_wait_for_work",
        "_wait_for_endpoint",
        "_wait_for_flush",
        "cancel_endpoint",
        "finish",
        "_close_transport",
        "release",
    ),
    "node.py": ("on_closing", "on_closed"),
    "session_lifecycle.py": ("detach", "_save_state", "_leave_presence"),
    "hub/hub.py": ("remove", "end_session"),
}
"""Functions that make up the teardown, by module."""

CALLS: dict[str, tuple[type, ...]] = {
    "on_closing": (Node, V1Protocol),
    "on_closed": (Node, SessionLifecycle),
    "add": (ClosingConnections, EndedSessions),
    "remove": (ClosingConnections, MemoryBudget, HeartbeatScheduler, ConnectionReaper, Hub, ConnectionRegistry),
    "release": (Reservation,),
    "leave": (PresenceTracker,),
    "detach": (SessionLifecycle,),
    "on_detached": (SessionStore,),
    "mark_closed": (MemoryBudget,),
    "_detach_user_data": (StableSocket,),
    "close": (Inbox,),
    "stop": (CredentialExpiry,),
    "on_failed": (V1Protocol,),
    "unread": (Inbox,),
    "discard": (AsgiOutbox, DirectOutbox),
    "finish": (AsgiOutbox, DirectOutbox, Session),
    "watch": (EndpointTask,),
    "schedule": (FlushScheduler,),
    "wait_idle": (EndpointTask,),
    "cancel": (EndpointTask,),
    "disconnect": (HookRegistry,),
    "notify_session_end": (SessionLifecycle,),
    "session_end": (HookRegistry,),
    "abort": (ServerTransport,),
    "abort_unless_flushed": (ServerTransport,),
    "abort_unless_answered": (ServerTransport,),
    "end": (SessionStore,),
    "suspend": (Hub,),
    "remove_queue": (ConnectionRegistry,),
    "stop_reader": (Connection,),
    "stop_reading": (Connection,),
    "close_inbox": (Connection,),
    "_close_outbox": (Teardown,),
    "_mark_websocket_disconnected": (Teardown,),
    "_wait_for_work": (Teardown,),
    "wait_for_predecessors": (Connection,),
    "run_disconnect_hooks": (Connection,),
    "_wait_for_endpoint": (Teardown,),
    "_wait_for_flush": (Teardown,),
    "_close_transport": (Teardown,),
    "call_when_over": (EndpointTask,),
    "on_ended": (Node,),
    "_save_rooms": (Node,),
    "_save_state": (SessionLifecycle,),
    "remember_end": (ReconnectTokenRegistry,),
    "_leave_presence": (SessionLifecycle,),
    "_detached_state_of": (SessionLifecycle,),
    "keep_rooms": (Hub,),
}
"""Calls of these functions, by name, and the classes in which the test makes each raise."""

SAFE = {
    *("attempt", "_attempt", "emit", "monotonic", "replace", "get_running_loop", "call_later", "current_task"),
    *("set", "set_result", "done", "max", "min", "wait_for_all", "ends_session", "give_up", "pending", "on_discarded"),
    *(
        "start",
        "finish",
        "map_close",
        "mark_closing",
        "on_flush_due",
        "isinstance",
        "cancel_endpoint",
        "resumable_key_of",
    ),
    *("_forget", "_arm", "add", "get", "detach", "_close_outbox", "leave_rooms"),
    *("stop", "stop_sending", "on_disconnect", "stop_accounting", "pop", "detaches", "is_terminal", "on_session_end"),
    *("unbind_current", "save", "mark_disconnected", "_abandon_endpoint", "len", "replace_with_ended"),
    *("EndedConnection", "spawn", "_run", "cancel_tasks", "local_close", "session_of"),
}
"""Calls that the test does not make raise.

They cannot raise, they hold the teardown together, or they belong to a step that raises as a whole.
"""

ESSENTIAL = {"disconnect", "run_disconnect_hooks", "on_closed"}
"""Calls that run the hooks or remove the connection: they raise only after their work."""

TARGETS = [(owner, name) for name, owners in CALLS.items() for owner in owners]


class Boom(Exception):
    """Exception that the test makes a call raise."""


class Bomb:
    """Patch that makes one method raise once after it is armed.

    Args:
        patch: The patches of the test.
        owner: The class.
        name: The method.
        after: Whether the method does its work before it raises.
    """

    def __init__(self, patch: pytest.MonkeyPatch, owner: type, name: str, *, after: bool) -> None:
        self.armed = False
        self.hit = False
        real = getattr(owner, name)

        def explode() -> bool:
            exploded, self.armed = self.armed, False
            self.hit = self.hit or exploded
            return exploded

        def sync(this: Any, *args: Any, **options: Any) -> Any:
            exploded = explode()
            if exploded and not after:
                raise Boom
            result = real(this, *args, **options)
            if exploded:
                raise Boom
            return result

        async def waiting(this: Any, *args: Any, **options: Any) -> Any:
            exploded = explode()
            if exploded and not after:
                raise Boom
            result = await real(this, *args, **options)
            if exploded:
                raise Boom
            return result

        patch.setattr(owner, name, waiting if asyncio.iscoroutinefunction(real) else sync)


def dial(stage: Stage, kind: str) -> Line:
    """Connect a client of the given kind."""
    if kind == "link":
        line = Line.__new__(Line)
        line.server, line.socket, line.error, line._stage = LinkServer(), None, None, stage
        line.server.websocket.scope["path_params"]["client_id"] = "ann"
        line.task = asyncio.ensure_future(line._serve())
        stage.lines.append(line)
        return line
    return Line(stage, "ann", subprotocols=(SUBPROTOCOL,) if kind == "v1" else ())


def end_by_client(line: Line) -> None:
    """Close the connection as the client, with 1000."""
    disconnect = {"type": "websocket.disconnect", "code": 1000, "reason": ""}
    if isinstance(line.server, LinkServer):
        line.server.sink.connection_lost(disconnect)
    else:
        line.server.feed(disconnect)


def end_by_network(line: Line) -> None:
    """Lose the network."""
    disconnect = {"type": "websocket.disconnect", "code": 1006}
    if isinstance(line.server, LinkServer):
        line.server.sink.connection_lost(disconnect)
    else:
        line.server.feed(disconnect)


def end_by_server(line: Line) -> None:
    """Close the connection as the server, without a flush."""
    assert line.socket is not None
    line.socket._connection.close(DisconnectReason.MEMORY)


def end_by_endpoint(line: Line) -> None:
    """Close the connection as the application."""
    assert line.socket is not None
    line.socket._connection.close(DisconnectReason.APPLICATION)


def end_by_kick(line: Line) -> None:
    """Close the connection as the application, with a code that is final for the client."""
    assert line.socket is not None
    line.socket._connection.close(DisconnectReason.APPLICATION, code=4403)


ENDS: tuple[Callable[[Line], None], ...] = (end_by_client, end_by_network, end_by_server, end_by_endpoint, end_by_kick)


def left_over(stage: Stage) -> dict[str, int]:
    """Return what the manager still holds of connections."""
    node = stage.manager._node
    admission = node.admission.limiter
    return {
        "unfinished": len(node.connections),
        "ending": len(node._closing),
        "registry": len(node.registry),
        "outboxes": sum(len(shard) for shard in node.registry.outboxes_by_shard()) - node.sessions.detached_count,
        "rooms": len(node.hub.rooms) - node.sessions.detached_count - len(node.detached.states),
        "present": len(node.hub.presence),
        "lifetimes": len(node.reaper),
        "reservations": len(admission),
    }


async def play(bomb: Bomb, kind: str, end: Callable[[Line], None], *, complete: bool) -> None:
    """Close one connection, and check what is left."""
    options = {
        "disconnect_grace": 2,
        "send_timeout": 1,
        "max_total_memory": 10**8,
        "max_connections": 9,
        "presence_grace": 0,
    }
    async with Stage(**options, max_lifetime=1000) as stage:
        manager = stage.manager

        async def endpoint(ws: StableSocket) -> None:
            await ws.join("lobby")
            ws.user_data["saved"] = 1
            await ws.receive()
            await stage.gate.wait()

        stage.endpoint = endpoint
        line = dial(stage, kind)
        if kind == "v1":
            await line.say({"type": "hello", "v": 1, "n": 1, "client": "x"})
        await soon()
        assert line.socket is not None, kind
        manager.generate_reconnect_token("ann")
        connection = line.socket._connection
        if kind == "v1":
            connection.credential = CredentialExpiry()
            connection.credential.reset(connection, 500)
            await line.message("note", "unread", "unread")
        bomb.armed = True
        end(line)
        hits_later = bomb.armed
        await asyncio.wait({connection.closed}, timeout=60)
        bomb.armed = False
        await asyncio.wait({line.task}, timeout=60)
        assert connection.is_closed, "the teardown did not reach its last step"
        assert line.task.done(), "the endpoint did not end"
        assert hits_later or bomb.hit
        assert [event for event in stage.events if event.startswith("disconnect ann")] == [
            f"disconnect ann {connection.close_info.cause.value}"
        ]
        events = [event for event in stage.heard.all if isinstance(event.error, Boom)]
        assert len(events) == bomb.hit, [event.event for event in events]
        await asyncio.sleep(10)
        if complete:
            assert not any(left_over(stage).values()), left_over(stage)


@pytest.fixture
def patch() -> Iterator[pytest.MonkeyPatch]:
    """Patches that are undone within the test."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.mark.parametrize(("owner", "name"), TARGETS, ids=lambda one: getattr(one, "__name__", one))
@virtually
async def test_teardown_completes_when_one_call_raises(owner: type, name: str) -> None:
    """If any single call of the teardown raises, the teardown completes and the failure is reported once."""
    hits = 0
    for after in (False, True):
        if name in ESSENTIAL and not after:
            continue
        for kind in ("plain", "link", "v1"):
            for end in ENDS:
                with pytest.MonkeyPatch.context() as patch:
                    bomb = Bomb(patch, owner, name, after=after)
                    await play(bomb, kind, end, complete=after)
                hits += bomb.hit
    assert hits, "no teardown makes this call: remove it from the list"


def test_every_call_of_teardown_is_covered() -> None:
    """Each call in a function of the teardown is either made to raise or known to be safe."""
    unknown = []
    for module, functions in TEARDOWN.items():
        tree = ast.parse((PACKAGE / module).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name in functions:
                for call in ast.walk(node):
                    if isinstance(call, ast.Call):
                        callee = call.func
                        name = callee.attr if isinstance(callee, ast.Attribute) else getattr(callee, "id", "?")
                        if name in ("attempt", "_attempt"):
                            step = call.args[0]
                            name = step.attr if isinstance(step, ast.Attribute) else getattr(step, "id", "?")
                        if name not in CALLS and name not in SAFE:
                            unknown.append(f"{module}: {node.name} calls {name}")
    assert not unknown
