"""Tests of a manager with the Python client over an in-memory link that a test can break."""

from __future__ import annotations

import asyncio
import contextlib
import random
from types import TracebackType
from typing import Any

import pytest
from fastapi import HTTPException, WebSocketException
from pydantic import BaseModel
from starlette.websockets import WebSocket

from fastapi_ws_stabilizer.client import (
    Client,
    ClientClosedError,
    Gap,
    MessageTooLargeError,
    RefusedError,
    RequestError,
    SessionLostError,
)
from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.errors import MessageEncodeError
from fastapi_ws_stabilizer.socket import StableSocket
from fastapi_ws_stabilizer.wire.v1.frames import parse
from tests.simulation.network import Link, Network
from tests.support.fake_link import soon, virtually
from tests.support.fake_websocket import with_deadline
from tests.support.stage import Peer, Stage


class Even(random.Random):
    """Random source that gives each direction the same delay, 30 ms."""

    def random(self) -> float:
        return 0.5


class World(Stage):
    """Stage with a network without faults of its own, and with clients that connect over it.

    Attributes:
        clients: The clients.
        received: The data of all messages that the first client got without a handler, in order.
        gaps: The gaps that were reported to it.
        outcomes: The outcomes of its welcomes.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.network = Network(Even(), self._serve, faulty=False)
        self.clients: list[Client] = []
        self.received: list[Any] = []
        self.gaps: list[Gap] = []
        self.outcomes: list[str] = []
        self._reader: asyncio.Future[None] | None = None

    async def _serve(self, websocket: WebSocket) -> None:
        try:
            async with self.manager.serve(websocket) as socket:
                await self.endpoint(socket)
        except (WebSocketException, HTTPException):
            pass

    def client(self, **options: Any) -> Client:
        """Create a client; what the first one receives is recorded."""
        client = Client("ws://server/ws", dial=self.network.dial, **{"base_delay": 0.2, **options})
        self.clients.append(client)
        if len(self.clients) == 1:
            client.on_gap(self.gaps.append)
            client.on_open(self.outcomes.append)
            self._reader = asyncio.ensure_future(self._read(client))
        return client

    async def _read(self, client: Client) -> None:
        with contextlib.suppress(ClientClosedError):  # a test checks that itself
            async for message in client:
                self.received.append(message.data)

    def cut(self) -> None:
        """Break the newest connection; both sides see it."""
        self.link.lose_client(1006)
        self.link.tell_server(1006)

    @property
    def link(self) -> Link:
        """The newest connection."""
        return self.network.links[-1]

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for client in self.clients:
            await client.close()
        if self._reader is not None:
            await with_deadline(self._reader)
        await super().__aexit__(kind, error, trace)
        if self.network.tasks:
            await with_deadline(asyncio.wait(set(self.network.tasks)))


@virtually
async def test_broken_connections_lose_and_repeat_no_message() -> None:
    """After broken connections both sides have all messages, in order and without duplicates."""
    async with World() as world, world.client() as client:
        for number in range(200):
            client.send(number, event="note")
            await world.manager.send_to_client("ann", number)
            if number % 50 == 25:
                world.cut()
            await asyncio.sleep(0.05)
        await client.send("last", event="note")
        await asyncio.sleep(1)
        assert world.notes == [*range(200), "last"]
        assert world.received == list(range(200))
        assert (world.outcomes[0], set(world.outcomes[1:]), world.gaps) == ("none", {"full"}, [])


@virtually
async def test_client_resumes_over_half_open_connection() -> None:
    """The server has not noticed the loss, but the session continues in the new connection."""
    async with World() as world, world.client() as client:
        world.link.up.dead = world.link.down.dead = True
        sending = client.send("x", event="note")
        client.reconnect()
        await with_deadline(sending)
        assert world.events == ["connect ann", "disconnect ann replaced", "resume ann full"]
        assert world.notes == ["x"]


@virtually
async def test_client_request_is_answered_once_after_reconnect() -> None:
    """A request survives a broken connection: the reply of its handler comes in the next connection."""
    async with World() as world, world.client() as client:

        @world.manager.on_message("slow")
        async def slow(ws: StableSocket, data: int) -> int:
            world.notes.append(data)
            await world.gate.wait()
            return data + 1

        asking = asyncio.ensure_future(client.request("slow", 1, timeout=60))
        await asyncio.sleep(0.5)
        world.cut()
        await asyncio.sleep(2)
        world.gate.set()
        assert await with_deadline(asking) == 2
        assert world.notes == [1]


@virtually
async def test_server_request_is_answered_after_reconnect() -> None:
    """A client that loses its connection while it works on a request replies in the next connection."""
    async with World() as world, world.client() as client:

        @client.on("confirm")
        async def confirm(data: str) -> str:
            world.cut()
            await asyncio.sleep(1)
            return f"{data}!"

        asking = asyncio.ensure_future(world.socket().request("confirm", "sure", timeout=60))
        await asyncio.sleep(5)
        assert await with_deadline(asking) == "sure!"


@virtually
async def test_send_with_ack_to_client_takes_one_round_trip() -> None:
    """The server requests the acknowledgement, so that `send(ack=True)` takes one round trip instead of two."""
    async with World() as world, world.client():
        began = asyncio.get_running_loop().time()
        await world.socket().send("x", ack=True)
        assert asyncio.get_running_loop().time() - began < 0.1


@virtually
async def test_lost_session_reports_gap_and_fails_unacked_messages() -> None:
    """A lost session is reported as a gap, its unaccepted messages fail, and the new session works."""
    async with World() as world, world.client() as client:
        world.link.up.dead = True
        unknown = client.send("unknown", event="note")
        await asyncio.sleep(0.5)
        world.cut()
        await asyncio.sleep(0)
        world.manager._node.sessions.detached_of("ann")[0].evict()
        with pytest.raises(SessionLostError):
            await with_deadline(unknown)
        await client.send("new", event="note")
        assert world.notes == ["new"]
        assert [(gap.session_lost, gap.why) for gap in world.gaps] == [(True, "unknown")]


@virtually
async def test_client_closed_4409_reports_gap() -> None:
    """After 4409 the session is lost: the client begins a new one and reports a gap, as messages may be missing."""
    async with World() as world, world.client() as client:
        await world.manager.send_to_client("ann", "first")
        await asyncio.sleep(0.5)
        session = client.session
        world.socket()._connection.close(DisconnectReason.REPLACED)
        await asyncio.sleep(5)
        assert client.session != session
        assert [(gap.session_lost, gap.why, gap.first, gap.last) for gap in world.gaps] == [(True, "given_up", 2, None)]
        assert world.outcomes == ["none", "lost"]
        await client.send("x", event="note")
        assert world.notes == ["x"]


@virtually
async def test_message_over_server_limit_raises_without_close() -> None:
    """A message above the server's max_message_size raises and does not close the connection."""
    async with World(max_message_size=1000) as world, world.client() as client:
        with pytest.raises(MessageTooLargeError):
            client.send("x" * 1000, event="note")
        with pytest.raises(MessageTooLargeError):
            client.send_volatile("x" * 1000)
        with pytest.raises(MessageTooLargeError):
            client.send(b"x" * 1000, event="note")
        with pytest.raises(MessageTooLargeError):
            await client.request("echo", "é" * 500)
        await client.send("x" * 900, event="note")
        assert client.send_volatile("y", event="note")
        await asyncio.sleep(0.5)
        assert (world.notes, world.outcomes) == (["x" * 900, "y"], ["none"])


@virtually
async def test_queued_message_over_server_limit_raises_on_welcome() -> None:
    """A queued message fails when the welcome states a smaller limit; the messages behind it are sent."""
    async with World(max_message_size=1000) as world:
        client = world.client()
        before, large, after = (client.send(data, event="note") for data in ("a", "x" * 2000, "b"))
        request = asyncio.ensure_future(client.request("echo", "x" * 2000))
        client.start()
        with pytest.raises(MessageTooLargeError):
            await with_deadline(large)
        await with_deadline(asyncio.gather(before, after))
        assert (world.notes, world.outcomes) == (["a", "b"], ["none"])
        with pytest.raises(MessageTooLargeError):
            await with_deadline(request)


@virtually
async def test_largest_sendable_message_is_accepted() -> None:
    """The server accepts the largest message that the client can send, which is above 90 % of the limit."""
    async with World(max_message_size=1000) as world, world.client() as client:
        size = 1000
        while True:
            try:
                await client.send("x" * size, event="note")
                break
            except MessageTooLargeError:
                size -= 1
        assert world.outcomes == ["none"]
        assert size > 900


@virtually
async def test_client_closed_4410_does_not_reconnect() -> None:
    """After `ws.close()` pending requests fail and the client does not reconnect."""
    async with World() as world, world.client() as client:
        asking = asyncio.ensure_future(client.request("wait", 1, timeout=60))
        await asyncio.sleep(0.5)
        await world.socket().close()
        with pytest.raises(ClientClosedError) as caught:
            await with_deadline(asking)
        await asyncio.sleep(60)
        assert (caught.value.code, client.state, client.attempts) == (4410, "closed", 1)


@virtually
async def test_request_error_of_handler_reaches_client() -> None:
    """A `RequestError` of a handler is raised by the client's `request`."""
    async with World() as world, world.client() as client:

        @world.manager.on_message("no")
        async def no(ws: StableSocket, data: Any) -> None:
            raise RequestError("never", "no")

        with pytest.raises(RequestError) as caught:
            await client.request("no", 1)
        assert (caught.value.code, caught.value.message) == ("never", "no")


@virtually
async def test_message_failing_handler_is_not_sent_again() -> None:
    """A failing handler's message counts as accepted: the client reconnects once and does not send it again."""
    async with World() as world, world.client() as client:
        await client.send("x", event="bug")
        await client.send("y", event="note")
        await asyncio.sleep(60)
        assert world.notes == ["y"]
        assert world.events == ["connect ann", "disconnect ann error", "resume ann full"]


@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize(
    "result",
    [RuntimeError("secret"), HTTPException(403), {"x": object()}, 10**400, "x" * (17 * 1024 * 1024), KeyError("k")],
    ids=lambda result: repr(result)[:16],
)
def test_request_to_failing_handler_gets_error_reply(result: Any, concurrency: int) -> None:
    """A handler that raises, or returns an unsendable value, answers `handler_failed`, though the connection closes."""

    @virtually
    async def play() -> None:
        async with World() as world, world.client() as client:
            world.endpoint = lambda ws: ws.run(concurrency=concurrency)

            @world.manager.on_message("fail")
            async def fail(ws: StableSocket, data: Any) -> Any:
                if isinstance(result, Exception):
                    raise result
                return result

            began = asyncio.get_running_loop().time()
            with pytest.raises(RequestError) as caught:
                await client.request("fail", 1, key="k")
            assert (caught.value.code, "secret" in caught.value.message) == ("handler_failed", False)
            assert asyncio.get_running_loop().time() - began < 3

    play()


@virtually
async def test_request_to_cancelled_handler_gets_error_reply() -> None:
    """A handler that is cancelled because a concurrent one fails answers `interrupted`."""
    async with World() as world:
        world.endpoint = lambda ws: ws.run(concurrency=4)
        async with world.client() as client:
            waiting = asyncio.ensure_future(client.request("wait", 1))
            await asyncio.sleep(0.5)
            with pytest.raises(RequestError, match="handler_failed"):
                await client.request("bug", 1)
            with pytest.raises(RequestError, match="interrupted"):
                await with_deadline(waiting)


@pytest.mark.parametrize("api", ["iterates", "receives", "starlette"])
def test_request_to_self_reading_endpoint_gets_error_reply(api: str) -> None:
    """An endpoint that reads messages itself answers no requests, and the client gets an error at once."""

    @virtually
    async def play() -> None:
        async with World() as world:

            async def endpoint(ws: StableSocket) -> None:
                if api == "iterates":
                    async for message in ws:
                        world.notes.append(message)
                while True:
                    world.notes.append(await (ws if api == "receives" else ws.websocket).receive_text())

            world.endpoint = endpoint
            async with world.client() as client:
                with pytest.raises(RequestError, match="no_handler"):
                    await client.request("ask", "me")
                await client.send("x")
                assert world.notes == ["me", "x"]

    play()


@virtually
async def test_request_to_client_without_handler_gets_error_reply() -> None:
    """A client without a handler for a request answers `no_handler`, and gives the message to its loop."""
    async with World() as world, world.client():
        with pytest.raises(RequestError, match="no_handler"):
            await world.socket().request("ask", "me")
        assert world.received == ["me"]


@pytest.mark.parametrize("error", [RequestError("\ud800" * 99, "\ud800" * 9999), RequestError("x\x00", "y" * 9999)])
def test_long_handler_error_is_truncated_and_delivered(error: RequestError) -> None:
    """A `RequestError` of a handler reaches the client, truncated to its limits, for requests and for messages."""

    @virtually
    async def play() -> None:
        async with World() as world, world.client() as client:
            refused: list[Exception] = []
            client.on_error(refused.append)

            @world.manager.on_message("no")
            async def no(ws: StableSocket, data: Any) -> None:
                raise error

            with pytest.raises(RequestError) as caught:
                await client.request("no", 1)
            assert (len(caught.value.code), len(caught.value.message)) == (min(64, len(error.code)), 1024)
            client.send_volatile(1, event="no")
            await asyncio.sleep(1)
            assert [str(one) for one in refused] == [str(caught.value)]
            plain = world.plain("bob")
            await soon()
            await plain.say({"type": "no"})
            assert parse(plain.server.data[-1])["message"] == caught.value.message
            assert world.bugs == []

    play()


@virtually
async def test_credential_renewal_does_not_reconnect() -> None:
    """The server asks for a new credential in time, and the connection outlives each credential."""
    async with World() as world:
        shown: list[str | None] = []

        @world.manager.on_auth
        async def look(ws: StableSocket, credential: str | None) -> float:
            shown.append(credential)
            return 10.0

        given = iter(range(100))
        async with world.client(auth=lambda: f"credential {next(given)}") as client:
            await asyncio.sleep(35)
            assert client.attempts == 1
            assert shown == [f"credential {number}" for number in range(5)]


# ── a message of one client does not close another ──


def nested(levels: int) -> Any:
    """Return a value of so many nested lists."""
    value: Any = "x"
    for _ in range(levels):
        value = [value]
    return value


def largest() -> list[Any]:
    """Return values at the limits of what a client may send and an application may relay."""
    texts = ["\x00" * 100, "\u2028\x7f", '"\\', "NaN", "]" * 200, "9" * 400]
    return [nested(63), {"a": {"b": {"c": nested(60)}}}, 1.7e308, -(2**1023), *texts, [[]] * 500]


@virtually
async def test_relayed_message_of_any_value_closes_no_client() -> None:
    """Each value that a client may send arrives at the other clients when a handler relays it inside another object."""
    async with World() as world, world.client() as client:

        @world.manager.on_message("say")
        async def say(ws: StableSocket, data: Any) -> None:
            await world.manager.broadcast({"from": "x", "said": {"data": data}})

        line = await Peer(world, "stranger").dial()
        for number, value in enumerate(largest(), 1):
            await line.message("say", value, first=number)
        await asyncio.sleep(1)
        assert [one["said"]["data"] for one in world.received] == largest()
        assert (client.state, client.unreadable_frames) == ("open", 0)


@pytest.mark.parametrize(
    "value",
    [nested(80), 10**400, [-(10**309)], "x" * (17 * 1024 * 1024), {"a": float("inf")}],
    ids=["deep", "large int", "small int", "long", "infinity"],
)
def test_unreadable_value_raises_at_sender(value: Any) -> None:
    """Each method that sends raises `MessageEncodeError` for such a value, and all clients stay connected."""

    @virtually
    async def play() -> None:
        async with World() as world, world.client() as client:
            manager, socket = world.manager, world.socket()
            await socket.join("lobby")

            class Odd(BaseModel, ser_json_inf_nan="constants"):
                value: Any

            message = Odd(value=value) if isinstance(value, dict) else value
            senders = [
                manager.broadcast,
                manager.room("lobby").send,
                lambda message: manager.send_to_client("ann", message),
                socket.send,
                socket.send_json,
                lambda message: socket.request("ask", message),
            ]
            for send in senders:
                with pytest.raises(MessageEncodeError):
                    await send(message)
            await manager.broadcast("fine")
            await asyncio.sleep(1)
            assert (world.received, client.state, client.unreadable_frames) == (["fine"], "open", 0)

    play()


@virtually
async def test_invalid_request_event_raises_at_sender() -> None:
    """`ws.request` raises for an event that the client could not read."""
    async with World() as world, world.client() as client:
        for event in ("x" * 300, "a\nb"):
            with pytest.raises(MessageEncodeError, match="event"):
                await world.socket().request(event)
        assert client.state == "open"


# ── messages that the server rejects ──


@pytest.mark.parametrize("count", [150, 300, 900])
@pytest.mark.parametrize("options", [{"max_message_rate": 20, "max_message_burst": 100}, {"max_byte_rate": 5000}])
def test_messages_over_rate_arrive_once_in_order(count: int, options: dict[str, Any]) -> None:
    """Messages above the server's rate arrive later, each once and in order."""

    @virtually
    async def play() -> None:
        async with World(**options) as world:
            client = world.client()
            errors: list[Exception] = []
            client.on_error(errors.append)
            sent = [client.send(number, event="note") for number in range(count)]
            async with client:
                await asyncio.wait(sent)
                await asyncio.sleep(0.1)
                assert [one.exception() for one in sent] == [None] * count
                assert (world.notes, errors, world.outcomes.count("lost")) == ([*range(count)], [], 0)

    play()


@pytest.mark.parametrize("rate", [1, 2, 10])
@pytest.mark.parametrize("cut", [False, True])
def test_client_far_over_rate_is_never_closed(rate: int, cut: bool) -> None:
    """All messages are accepted in order at the rate, without a 4429, also after a reconnect."""
    count = 10 * rate + 200

    @virtually
    async def play() -> None:
        async with World(max_message_rate=rate) as world:
            client = world.client()
            closes: list[int] = []
            client.on_close(lambda code, reason: closes.append(code))
            sent = [client.send(number, event="note") for number in range(count)]
            async with client:
                started = asyncio.get_running_loop().time()
                if cut:
                    await asyncio.sleep(3)
                    client.reconnect()
                await asyncio.wait(sent)
                took = asyncio.get_running_loop().time() - started
                await asyncio.sleep(0.1)
            assert (closes, world.notes) == ([4000] * cut, [*range(count)])
            assert took == pytest.approx(count / rate, rel=0.2)

    play()


@pytest.mark.parametrize(
    ("event", "code"), [("nothing", "unknown_type"), ("whole", "invalid_message"), ("no", "never")]
)
def test_client_send_raises_error_of_server(event: str, code: str) -> None:
    """`await client.send` raises the server's error for a message that no handler accepts."""

    @virtually
    async def play() -> None:
        async with World() as world, world.client() as client:

            @world.manager.on_message("whole")
            async def whole(ws: StableSocket, number: int) -> None:
                pass

            @world.manager.on_message("no")
            async def no(ws: StableSocket, data: Any) -> None:
                raise RequestError("never", "no")

            with pytest.raises(RefusedError) as caught:
                await client.send("x", event=event)
            assert (caught.value.code, caught.value.event) == (code, event)

    play()


@virtually
async def test_request_over_max_bad_messages_is_answered() -> None:
    """The request that exceeds `max_bad_messages` is answered before the close frame."""
    async with World(max_bad_messages=1) as world, world.client() as client:
        for _ in range(2):
            with pytest.raises(RequestError, match="unknown_type"):
                await client.request("nothing")
        await soon()
        assert client.closed is not None
        assert client.closed.code == 1008


@virtually
@pytest.mark.parametrize("concurrency", [1, 2])
async def test_request_before_reader_task_is_handled(concurrency: int) -> None:
    """Requests that arrive before the endpoint starts its reader task are handled."""
    async with World(inbox_max_messages=4) as world:

        @world.manager.on_message("ask")
        async def ask(ws: StableSocket, number: int) -> int:
            return number

        async def endpoint(ws: StableSocket) -> None:
            while not ws.unread_messages:
                await asyncio.sleep(0.01)
            ws.create_task(ws.run(concurrency=concurrency))
            await ws.wait_closed()

        world.endpoint = endpoint
        async with world.client() as client:
            answers = await asyncio.gather(*(client.request("ask", number) for number in range(20)))
            assert answers == list(range(20))
