"""Architectural rules that can be tested without a server. The others are tested on real servers."""

from __future__ import annotations

import ast
import asyncio
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fastapi_ws_stabilizer
from fastapi_ws_stabilizer import manager as manager_module
from fastapi_ws_stabilizer.close_codes import CLOSE_POLICIES, DisconnectReason
from fastapi_ws_stabilizer.errors import MessageEncodeError
from fastapi_ws_stabilizer.wire.encoded import encode
from tests.support.fake_websocket import FakeServer, eventually, settle, with_deadline

PACKAGE = Path(fastapi_ws_stabilizer.__file__).parent
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))
TREES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}


def dotted(node: ast.AST) -> str:
    """Return the dotted name of an expression, such as `asyncio.create_task`."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    if isinstance(node, ast.Call):
        return f"{dotted(node.func)}()"
    return node.id if isinstance(node, ast.Name) else ""


def mentions(*last_names: str) -> dict[str, list[str]]:
    """Return modules that use an attribute or a name with one of these last parts, with what they use."""
    found: dict[str, list[str]] = {}
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.Attribute, ast.Name)) and dotted(node).split(".")[-1] in last_names:
                found.setdefault(module, []).append(dotted(node))
    return found


def imports(tree: ast.Module) -> Iterator[tuple[str, list[str]]]:
    """Return every import of a module: from where, and what."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)


def test_package_modules_are_found() -> None:
    """The list of modules is not empty, which would make these tests meaningless."""
    assert len(TREES) > 30
    assert "connection/connection.py" in TREES


# ── connections have ids ──


async def test_law_1_old_connection_teardown_spares_newer_one(manager_with: Any) -> None:
    """Every step of an old connection's teardown uses its connection id."""
    manager, _ = manager_with(on_duplicate="allow")
    old_server, new_server = FakeServer(), FakeServer()
    old = await manager.connect("ann", await old_server.accepted())
    new = await manager.connect("ann", await new_server.accepted())
    old_server.feed_disconnect(1001)
    await with_deadline(old._connection.closed)
    await with_deadline(old.close())
    assert manager.get_sockets("ann") == [new]
    assert new.close_info is None
    assert await manager.send_to_client("ann", "still here")
    await new_server.until(lambda: new_server.data == ["still here"])


# ── the pump always reads ──


async def test_law_2_pongs_and_closes_are_handled_during_user_code(manager_with: Any) -> None:
    """Pongs, pings and disconnects are processed even if the endpoint never reads."""
    manager, _ = manager_with()
    server = FakeServer()
    socket = await manager.connect("ann", await server.accepted())
    server.feed_text("ping", "pong", "data")
    server.feed_disconnect(1001)
    await with_deadline(socket.wait_closed())
    assert socket._connection.liveness.has_ponged
    assert socket.unread_messages == 1
    assert socket.reason is DisconnectReason.CLIENT_CLOSE


# ── no call waits for a slow client ──


async def test_law_3_no_call_waits_for_slow_client(manager_with: Any) -> None:
    """Broadcast, direct send, heartbeat, disconnect and eviction return while a client's send is stuck."""
    manager, _ = manager_with(heartbeat_interval=0.01)
    server = FakeServer()
    await manager.connect("slow", await server.accepted())
    server.block()
    await asyncio.wait_for(manager.broadcast("hi"), 1.0)
    await server.until(lambda: len(server.offered) == 2)
    await asyncio.wait_for(manager.broadcast("hi"), 1.0)
    await asyncio.wait_for(manager.send_to_client("slow", "hi"), 1.0)
    await asyncio.wait_for(manager.disconnect("slow"), 1.0)
    assert manager.get_connection_count() == 0
    assert server.data == []


# ── every local close sends a close frame ──


async def test_law_4_every_local_close_sends_its_table_code(bench: Any) -> None:
    """No local close leaves the client with 1006."""
    for reason in DisconnectReason:
        if reason is DisconnectReason.NETWORK_LOST:
            continue
        b = bench()
        connection, _ = await b.open()
        connection.close(reason)
        await with_deadline(connection.closed)
        assert b.server.close_frames == [(CLOSE_POLICIES[reason].code, CLOSE_POLICIES[reason].reason)]


async def test_law_4_normal_disconnect_logs_nothing_above_info(bench: Any) -> None:
    """Regardless of how a client disconnects, nothing is logged above INFO."""
    for code in (1000, 1001, 1005, 1006, 1012, 4000):
        b = bench()
        connection, _ = await b.open()
        b.server.feed_disconnect(code)
        await with_deadline(connection.closed)
        assert max(report.level for report in b.heard.all) <= logging.INFO


# ── no silent loss ──


async def test_law_5_unsent_and_unread_messages_are_reported(bench: Any) -> None:
    """Each message that a close discards is in the counters and in an event."""
    b = bench()
    connection, _ = await b.open()
    b.server.block()
    connection.enqueue(_frame("sending"))
    await b.server.until(lambda: len(b.server.offered) == 2)
    connection.enqueue(_frame("never sent"))
    b.server.feed_text("never read")
    await eventually(lambda: len(connection.inbox) == 1)
    connection.close(DisconnectReason.APPLICATION)
    connection.abort()
    await with_deadline(connection.closed)
    assert b.events.counters.messages_received == 1
    assert b.events.counters.messages_sent == 0
    assert b.events.counters.messages_discarded == 3
    assert sum(report.fields["count"] for report in b.heard.of("messages_discarded")) == 3


async def test_law_5_unread_message_after_endpoint_return_is_counted(manager_with: Any) -> None:
    """An unread message counts as discarded when its endpoint has returned after a close by the client."""
    manager, _ = manager_with()
    server = FakeServer()
    server.feed_text("1", "2", "3")
    server.feed_disconnect(1001)
    async with manager.serve(server.websocket, "ann") as socket:
        await with_deadline(socket.wait_closed())
        assert await socket.receive() == "1"
    assert manager.counters.messages_discarded == 2


# ── encode once ──


async def test_law_6_broadcast_is_encoded_once(manager_with: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The payload is serialised once for any number of clients."""
    manager, _ = manager_with()
    servers = [FakeServer() for _ in range(20)]
    for number, server in enumerate(servers):
        await manager.connect(f"client-{number}", await server.accepted())
    encoded: list[Any] = []
    real = manager_module.encode
    monkeypatch.setattr(manager_module, "encode", lambda message, *_, **__: encoded.append(message) or real(message))
    await manager.broadcast({"n": 1})
    for server in servers:
        await server.until(lambda server=server: server.data)
    assert encoded == [{"n": 1}]
    first = servers[0].data[0]
    assert all(server.data[0] is first for server in servers)


async def test_law_6_unencodable_payload_touches_no_socket(manager_with: Any) -> None:
    """The call raises, no client gets a message, and no connection closes."""
    manager, heard = manager_with(handle_signals=False)
    await manager.start()
    server = FakeServer()
    await manager.connect("ann", await server.accepted())
    with pytest.raises(MessageEncodeError):
        await manager.broadcast({"x": object()})
    await settle()
    assert server.data == []
    assert manager.get_connection_count() == 1
    assert manager.counters.broadcasts == 0
    assert heard.events == ["connection_opened"]


# ── no dead options ──


def test_law_7_every_option_is_read() -> None:
    """Each option is used somewhere in the package; `tests/test_options.py` tests its effect."""
    outside_of_config = "".join(path.read_text(encoding="utf-8") for path in MODULES if path.name != "config.py")
    for option in fastapi_ws_stabilizer.WebSocketConfig.model_fields:
        assert f"config.{option}" in outside_of_config, option


# ── cancellation ──


def test_law_8_no_context_manager_is_open_at_yield() -> None:
    """No task group, cancel scope or timeout is open where a generator yields, because it would cancel other code."""
    guards = ("TaskGroup", "create_task_group", "CancelScope", "timeout", "timeout_at", "fail_after", "move_on_after")
    offenders = []
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.With, ast.AsyncWith)):
                opened = [dotted(item.context_expr).removesuffix("()").split(".")[-1] for item in node.items]
                yields = [inner for inner in ast.walk(node) if isinstance(inner, (ast.Yield, ast.YieldFrom))]
                if yields and set(opened) & set(guards):
                    offenders.append(f"{module}:{node.lineno}")
    assert offenders == []


def test_law_8_caught_cancellation_is_raised_again() -> None:
    """Every handler of `CancelledError` or `BaseException` raises again."""
    offenders = []
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
                names = {dotted(kind).split(".")[-1] if kind is not None else "BaseException" for kind in kinds}
                raises = any(
                    isinstance(inner, ast.Raise)
                    or (isinstance(inner, ast.Call) and dotted(inner.func).endswith(".throw"))  # into a coroutine
                    for inner in ast.walk(node)
                )
                if names & {"CancelledError", "BaseException"} and not raises:
                    offenders.append(f"{module}:{node.lineno}")
    assert offenders == []


# ── one clock, one module that creates tasks ──


def test_law_9_only_clock_module_reads_time() -> None:
    """Only `clock.py` reads the time, so durations use the monotonic clock alone."""
    readers = mentions("monotonic", "time", "perf_counter", "time_ns", "monotonic_ns", "now", "utcnow", "today")
    readers = {module: [name for name in names if "." in name] for module, names in readers.items()}
    assert {module for module, names in readers.items() if names} == {"clock.py"}


def test_law_9_other_modules_do_not_import_clocks() -> None:
    """Other modules use `time` and `datetime` only for durations and formats, not to read a clock."""
    importers = {
        module: sorted(name for source, names in imports(tree) if source in ("time", "datetime") for name in names)
        for module, tree in TREES.items()
        if any(source in ("time", "datetime") for source, _ in imports(tree))
    }
    assert importers == {
        "clock.py": [],
        "observability/logs.py": [],
        "config.py": ["timedelta"],
        "handshake/client_id.py": ["datetime"],
    }


def test_only_tasks_module_creates_tasks() -> None:
    """Only `tasks.py` creates a task; `StableSocket.create_task` uses it too."""
    makers = mentions("create_task", "ensure_future", "run_coroutine_threadsafe", "TaskGroup", "create_task_group")
    assert set(makers) == {"tasks.py"}


def test_no_asyncio_queue_is_used() -> None:
    """No `asyncio.Queue` is used, because its limit counts messages only and is optional."""
    assert mentions("Queue", "LifoQueue", "PriorityQueue", "SimpleQueue") == {}


# ── imports ──


def test_package_root_is_not_imported_inside_package() -> None:
    """Inside the package each import names the module, so that the dependency is visible."""
    offenders = [
        module
        for module, tree in TREES.items()
        for source, names in imports(tree)
        if source == "fastapi_ws_stabilizer" or source.startswith(".")
    ]
    assert offenders == []


def test_law_12_only_dependencies_are_imported() -> None:
    """The core needs FastAPI, its dependencies, and the standard library."""
    allowed = {
        "fastapi",
        "starlette",
        "pydantic",
        "pydantic_core",
        "typing_extensions",
        "anyio",
        "fastapi_ws_stabilizer",
    }
    foreign = {
        (module, source.split(".")[0])
        for module, tree in TREES.items()
        for source, _ in imports(tree)
        if source.split(".")[0] not in allowed | set(sys.stdlib_module_names)
    }
    assert foreign == {
        ("servers/uvicorn/compat.py", "uvicorn"),
        ("servers/uvicorn/compat.py", "websockets"),
        ("servers/uvicorn/protocol.py", "websockets"),
        ("servers/uvicorn/deflate.py", "websockets"),
        ("servers/uvicorn/upgrade.py", "websockets"),
        ("client/websockets_transport.py", "websockets"),
        ("doctor/rich_table.py", "rich"),
        ("stats/prometheus.py", "prometheus_client"),
    }


def test_law_12_modules_with_extras_are_not_imported() -> None:
    """Modules that need an optional package are imported lazily."""
    importers = {
        module
        for module, tree in TREES.items()
        for source, names in imports(tree)
        for imported in (source, *(f"{source}.{name}" for name in names))
        if imported
        in (
            "fastapi_ws_stabilizer.servers.uvicorn.protocol",
            "fastapi_ws_stabilizer.servers.uvicorn.compat",
            "fastapi_ws_stabilizer.servers.uvicorn.paced_parser",
            "fastapi_ws_stabilizer.servers.uvicorn.deflate",
            "fastapi_ws_stabilizer.servers.uvicorn.frame_parser",
            "fastapi_ws_stabilizer.servers.uvicorn.upgrade",
            "fastapi_ws_stabilizer.client.websockets_transport",
            "fastapi_ws_stabilizer.doctor.rich_table",
            "fastapi_ws_stabilizer.stats.prometheus",
        )
    }
    assert importers == {
        "servers/uvicorn/__init__.py",  # only when its class is accessed
        "servers/uvicorn/protocol.py",
        "servers/uvicorn/paced_parser.py",
        "servers/uvicorn/frame_parser.py",
    }


def test_public_names_exist_in_order() -> None:
    """Every name in `__all__` exists, in order, and the version is valid."""
    names = fastapi_ws_stabilizer.__all__
    assert names == sorted(names)
    assert all(hasattr(fastapi_ws_stabilizer, name) for name in names)
    assert fastapi_ws_stabilizer.__version__.count(".") == 2
    assert (PACKAGE / "py.typed").exists()


def test_public_names_have_docstrings() -> None:
    """Each public name has a docstring that starts with a sentence."""
    missing = []
    for module, tree in TREES.items():
        for node in [tree, *ast.walk(tree)]:
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                name = getattr(node, "name", "")
                if not name.startswith("_") and not ast.get_docstring(node) and not _is_inner(tree, node):
                    missing.append(f"{module}:{name}")
    assert missing == []


def _is_inner(tree: ast.Module, node: ast.AST) -> bool:
    """Return whether a function is nested, is an overload, or belongs to a private class."""
    for outer in ast.walk(tree):
        if outer is node:
            continue
        if isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef)) and node in ast.walk(outer):
            return True
        if isinstance(outer, ast.ClassDef) and outer.name.startswith("_") and node in ast.walk(outer):
            return True
    decorators = getattr(node, "decorator_list", [])
    return any(dotted(decorator).split(".")[-1] == "overload" for decorator in decorators)


# ── no cost when idle, and nothing left behind ──


def _timers() -> int:
    loop: Any = asyncio.get_running_loop()
    return sum(1 for timer in loop._scheduled if not timer.cancelled())


def _of_connections(tasks: set[Any]) -> list[str]:
    return [task.get_name() for task in tasks if task.get_name().startswith("ws-")]


async def test_law_11_idle_connection_has_one_task_and_no_timer(manager_with: Any) -> None:
    """A hundred idle connections need a hundred pumps and the single timer of the heartbeat."""
    manager, _ = manager_with(heartbeat_interval=100_000)  # no ping is due during the test
    await manager.start()
    tasks, timers = asyncio.all_tasks(), _timers()
    for number in range(100):
        await manager.connect(f"client-{number}", await FakeServer().accepted())
    await settle()
    added = asyncio.all_tasks() - tasks
    assert len(added) == 100
    assert {task.get_name() for task in added} == {"ws-pump"}
    assert _timers() - timers == 1


async def test_closed_connection_leaves_no_entry(manager_with: Any) -> None:
    """After all kinds of closes, registry, heartbeat, tasks and closing connections are empty."""
    manager, _ = manager_with()
    await manager.start()
    before = asyncio.all_tasks()
    servers = [FakeServer() for _ in range(6)]
    sockets = [await manager.connect(f"c{number}", await server.accepted()) for number, server in enumerate(servers)]
    for socket in sockets:
        socket.create_task(asyncio.Event().wait())
        await socket.send("hi")
    await settle()
    servers[0].feed_disconnect(1001)
    servers[1].feed(RuntimeError("reset"))
    await manager.disconnect("c2")
    await sockets[3].close()
    sockets[4]._connection.close(DisconnectReason.HEARTBEAT_TIMEOUT)
    sockets[5]._connection.on_send_stalled()
    for socket in sockets:
        await with_deadline(asyncio.shield(socket._connection.closed))
    node = manager._node
    await eventually(lambda: len(node._tasks) == 0)
    assert manager.get_connection_count() == 0
    assert manager.get_active_connections() == []
    assert len(node.heartbeat) == 0
    assert len(node.connections) == 0
    await eventually(lambda: not _of_connections(asyncio.all_tasks() - before))
    assert sum(manager.counters.endings.values()) == 6


def _frame(text: str) -> Any:
    return encode(text)
