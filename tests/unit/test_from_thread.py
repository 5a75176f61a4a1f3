"""Tests of `manager.from_thread`, and of calls on a wrong event loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import sys
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from fastapi_ws_stabilizer.errors import (
    ConnectionNotFoundError,
    ManagerNotRunningError,
    MessageEncodeError,
    RequestTimeoutError,
    ThreadCallTimeoutError,
    WrongLoopError,
)
from fastapi_ws_stabilizer.manager import WebSocketConnectionManager
from fastapi_ws_stabilizer.socket import StableSocket
from tests.support.own_loop import run
from tests.support.stage import Stage
from tests.unit.test_manager import Client

Manager = WebSocketConnectionManager
Call = Callable[[Manager, StableSocket], Coroutine[Any, Any, Any]]


async def _nothing() -> None: ...


async def create_task(_: Manager, ws: StableSocket) -> Any:
    return ws.create_task(_nothing())


async def describe(manager: Manager, _: StableSocket) -> Any:
    return manager.room("lobby").set_presence("ann", colour="red")


CALLS: dict[str, Call] = {
    "manager.broadcast": lambda manager, ws: manager.broadcast("hi"),
    "manager.broadcast to a room": lambda manager, ws: manager.broadcast("hi", room="lobby"),
    "manager.send_to_client": lambda manager, ws: manager.send_to_client("ann", "hi"),
    "manager.disconnect": lambda manager, ws: manager.disconnect("ann"),
    "manager.revoke": lambda manager, ws: manager.revoke("ann"),
    "manager.handle_pong": lambda manager, ws: manager.handle_pong("ann"),
    "manager.set_user_data": lambda manager, ws: manager.set_user_data("ann", "x", 1),
    "manager.get_user_data": lambda manager, ws: manager.get_user_data("ann", "x"),
    "manager.validate_reconnect_token": lambda manager, ws: manager.validate_reconnect_token("x"),
    "manager.start": lambda manager, ws: manager.start(),
    "manager.drain": lambda manager, ws: manager.drain(),
    "manager.graceful_shutdown": lambda manager, ws: manager.graceful_shutdown(),
    "room.send": lambda manager, ws: manager.room("lobby").send("hi"),
    "room.close": lambda manager, ws: manager.room("lobby").close(),
    "room.remove": lambda manager, ws: manager.room("lobby").remove("ann"),
    "room.disconnect": lambda manager, ws: manager.room("lobby").disconnect(),
    "room.describe": describe,
    "ws.send": lambda manager, ws: ws.send("hi"),
    "ws.send with a key": lambda manager, ws: ws.send("hi", coalesce_key="x"),
    "ws.send with ack": lambda manager, ws: ws.send("hi", ack=True),
    "ws.send_text": lambda manager, ws: ws.send_text("hi"),
    "ws.send_bytes": lambda manager, ws: ws.send_bytes(b"hi"),
    "ws.send_json": lambda manager, ws: ws.send_json("hi"),
    "ws.request": lambda manager, ws: ws.request("hi"),
    "ws.receive": lambda manager, ws: ws.receive(),
    "ws.receive_text": lambda manager, ws: ws.receive_text(),
    "ws.receive_json": lambda manager, ws: ws.receive_json(),
    "async for": lambda manager, ws: ws.__anext__(),  # type: ignore[dict-item, return-value]
    "ws.run": lambda manager, ws: ws.run(),
    "ws.join": lambda manager, ws: ws.join("attic"),
    "ws.leave": lambda manager, ws: ws.leave("lobby"),
    "ws.close": lambda manager, ws: ws.close(),
    "ws.wait_closed": lambda manager, ws: ws.wait_closed(),
    "ws.create_task": create_task,
    "websocket.send_text": lambda manager, ws: ws.websocket.send_text("hi"),
    "websocket.receive_text": lambda manager, ws: ws.websocket.receive_text(),
}


async def in_a_thread(call: Callable[[], Any]) -> Any:
    """Return the result of a call in a new thread without an event loop."""
    return await asyncio.wait_for(asyncio.to_thread(call), 5)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
async def test_call_on_other_loop_raises_and_changes_nothing(manager_with: Any, name: str) -> None:
    """Each call of manager, room and socket raises `WrongLoopError` on another loop, and changes nothing."""
    manager, _ = manager_with()
    ann = Client(manager, "ann")
    await ann.connected()
    (ws,) = manager.get_sockets("ann")
    await ws.join("lobby", {"colour": "blue"})
    with pytest.raises(WrongLoopError, match=r"from_thread|TestClient"):
        await in_a_thread(lambda: asyncio.run(asyncio.wait_for(CALLS[name](manager, ws), 2)))
    assert (ws.rooms, ws.closed, ws.user_data, manager.running) == (("lobby",), False, {}, True)
    assert manager.room("lobby").presence[0].metadata == {"colour": "blue"}
    await ws.send("after")
    await ann.server.until(lambda: ann.server.data == ["after"])
    await ann.disconnect()


async def test_read_only_calls_work_from_any_thread(manager_with: Any) -> None:
    """Read-only calls work in any thread, such as that of a `def` route."""
    manager, _ = manager_with()
    ann = Client(manager, "ann")
    await ann.connected()
    (ws,) = manager.get_sockets("ann")
    await ws.join("lobby")

    def look() -> Any:
        room = manager.room("lobby")
        return (
            manager.get_active_connections(),
            manager.get_connection_count(),
            manager.get_sockets("ann") == [ws],
            manager.get_rooms(),
            room.clients,
            len(room),
            ws.rooms,
            ws.closed,
        )

    assert await in_a_thread(look) == (["ann"], 1, True, ["lobby"], ["ann"], 1, ("lobby",), False)
    await ann.disconnect()


async def test_call_from_thread_returns_result(manager_with: Any) -> None:
    """broadcast, send_to_client, disconnect and run work from a thread, and return their results."""
    manager, _ = manager_with()
    ann, bob = Client(manager, "ann"), Client(manager, "bob")
    await ann.connected()
    await bob.connected()
    (ws,) = manager.get_sockets("ann")
    await ws.join("lobby")

    def calls() -> Any:
        threads = manager.from_thread
        results = (
            threads.broadcast("all").total,
            threads.broadcast("room", room="lobby").total,
            threads.broadcast("bob", "ann").total,
            threads.send_to_client("ann", {"to": "ann"}),
            threads.send_to_client("eve", "x"),
            threads.run(ws.send, "by run"),
            threads.run(manager.get_connection_count),
        )
        threads.disconnect("bob", 4001, "bye")
        return results

    assert await in_a_thread(calls) == (2, 1, 1, True, False, None, 2)
    await ann.server.until(lambda: ann.server.data == ["all", "room", '{"to":"ann"}', "by run"])
    await bob.server.until(lambda: bob.server.close_frames == [(4001, "bye")])
    assert bob.server.data == ["all", "bob"]
    await ann.disconnect()
    await bob.disconnect()


async def test_message_from_thread_with_history_false_is_not_stored(manager_with: Any) -> None:
    """`history=False` of `from_thread.broadcast` excludes a message from the room's history."""
    manager, _ = manager_with(room_history=10)
    ann, bob = Client(manager, "ann"), Client(manager, "bob")
    await ann.connected()
    await bob.connected()
    await manager.get_sockets("ann")[0].join("lobby")
    await in_a_thread(lambda: manager.from_thread.broadcast("stored", room="lobby"))
    await in_a_thread(lambda: manager.from_thread.broadcast("not stored", room="lobby", history=False))
    await manager.get_sockets("bob")[0].join("lobby", history=10)
    await bob.server.until(lambda: bob.server.data)
    assert bob.server.data == ["stored"]
    await ann.disconnect()
    await bob.disconnect()


async def _times_out() -> None:
    raise RequestTimeoutError(1.0)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda manager: manager.from_thread.broadcast(object()), MessageEncodeError),
        (lambda manager: manager.from_thread.send_to_client("ann", object()), MessageEncodeError),
        (lambda manager: manager.from_thread.disconnect("eve"), ConnectionNotFoundError),
        (lambda manager: manager.from_thread.disconnect("eve", 1005), ValueError),
        (lambda manager: manager.from_thread.run(_times_out), RequestTimeoutError),
    ],
)
async def test_call_from_thread_raises_exception_of_call(
    manager_with: Any, call: Callable[[Manager], Any], error: type[Exception]
) -> None:
    """An exception of the call is raised in the thread, including its own `TimeoutError`."""
    manager, _ = manager_with()
    await manager.start()
    with pytest.raises(error):
        await in_a_thread(lambda: call(manager))


async def test_from_thread_on_own_loop_raises(manager_with: Any) -> None:
    """`from_thread` on the manager's own loop would block forever, so it raises and says what to write."""
    manager, _ = manager_with()
    await manager.start()
    with pytest.raises(WrongLoopError, match=r"await manager\.broadcast"):
        manager.from_thread.broadcast("hi")


async def test_call_from_thread_over_timeout_is_cancelled(manager_with: Any) -> None:
    """The thread waits for `timeout` seconds at most; then the call is cancelled."""
    manager, _ = manager_with()
    await manager.start()
    cancelled = asyncio.Event()

    async def forever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    with pytest.raises(ThreadCallTimeoutError, match=r"0\.05 seconds"):
        await in_a_thread(lambda: manager.from_thread.run(forever, timeout=0.05))
    await asyncio.wait_for(cancelled.wait(), 5)


def test_call_from_thread_before_start_raises() -> None:
    """A manager that was never started has no event loop for the call."""
    with pytest.raises(ManagerNotRunningError, match="lifespan"):
        WebSocketConnectionManager().from_thread.broadcast("hi")


def test_call_from_thread_after_loop_end_raises() -> None:
    """After the event loop has ended, calls raise at once."""
    manager = WebSocketConnectionManager()
    run(manager.start())
    with pytest.raises(ManagerNotRunningError):
        manager.from_thread.send_to_client("ann", "hi")


def test_call_from_thread_interrupted_by_loop_end_raises() -> None:
    """A thread that waits when the event loop ends gets an error."""
    manager = WebSocketConnectionManager()
    raised: list[BaseException] = []
    begun = threading.Event()

    async def forever() -> None:
        begun.set()
        await asyncio.Event().wait()

    def wait() -> None:
        try:
            manager.from_thread.run(forever)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=wait)

    async def main() -> None:
        await manager.start()
        thread.start()
        await asyncio.to_thread(begun.wait, 5)

    run(main())
    thread.join(5)
    assert [type(error) for error in raised] == [ManagerNotRunningError]


async def test_thread_pool_handler_sends_with_from_thread() -> None:
    """A `def` handler, which runs in the thread pool, answers its own client with `from_thread`."""
    async with Stage() as stage:

        @stage.manager.on_message("ask")
        def ask(ws: StableSocket) -> None:
            stage.manager.from_thread.run(ws.send, "answer")

        line = stage.plain()
        line.server.feed_text('{"type":"ask"}')
        await line.server.until(lambda: line.server.data == ["answer"])


@pytest.mark.skipif(
    sys.version_info < (3, 11), reason="Python 3.10 does not distinguish it from the end of the event loop"
)
async def test_cancelled_error_in_call_from_thread_is_raised(manager_with: Any) -> None:
    """A function that awaits a cancelled future raises `CancelledError`, although the manager is running."""
    manager, _ = manager_with()
    await manager.start()

    async def work() -> None:
        cancelled = asyncio.get_running_loop().create_future()
        cancelled.cancel()
        await cancelled

    def call() -> None:
        with pytest.raises(concurrent.futures.CancelledError):
            manager.from_thread.run(work)

    await in_a_thread(call)


async def test_token_by_client_id_from_thread_raises(manager_with: Any) -> None:
    """`generate_reconnect_token` with a client id changes the manager's state, so it belongs to its event loop."""
    manager, _ = manager_with()
    await manager.start()
    with pytest.raises(WrongLoopError, match="from_thread"):
        await in_a_thread(lambda: manager.generate_reconnect_token("ann"))
    token = await in_a_thread(lambda: manager.from_thread.run(manager.generate_reconnect_token, "ann"))
    assert await manager.validate_reconnect_token(token) == "ann"
