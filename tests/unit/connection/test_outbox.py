"""Tests of the send queue of a client, and of the only writer that sends it."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.connection import asgi_outbox as asgi_outbox_module
from fastapi_ws_stabilizer.connection import stall_watch as send_watch_module
from fastapi_ws_stabilizer.connection.asgi_outbox import AsgiOutbox, WriterPool
from fastapi_ws_stabilizer.connection.outbox import Outbox, SlowConsumer
from fastapi_ws_stabilizer.connection.send_queue import OutboxLimits
from fastapi_ws_stabilizer.events import Counters, EventBus
from fastapi_ws_stabilizer.scheduling import CallbackSemaphore, FlushScheduler
from fastapi_ws_stabilizer.tasks import TaskSet, wait_for_all
from fastapi_ws_stabilizer.wire.encoded import encode
from tests.support.fake_websocket import FakeServer, eventually, settle, with_deadline
from tests.support.own_loop import run
from tests.support.waiting import waiting_messages


class Owner:
    """Owner of an outbox, which records its callbacks."""

    connection_id = "test"
    context = None

    def __init__(self) -> None:
        self.counters = Counters()
        self.stuck = 0
        self.delayed_sends = 0
        self.failures: list[Exception] = []
        self.discarded = 0
        self.outbox: Outbox | None = None
        self.degrees: list[SlowConsumer | str] = []

    @property
    def taken(self) -> int:
        """Number of messages that were taken."""
        return self.counters.messages_sent

    def on_slow(self, how: SlowConsumer) -> None:
        """Record the degree of slowness."""
        self.degrees.append(how)

    def on_caught_up(self) -> None:
        """Record that the client has caught up."""
        self.degrees.append("caught up")

    def on_nonzero(self) -> None:
        """Do nothing."""

    def on_send_stalled(self) -> None:
        """Count a send that made no progress."""
        self.stuck += 1

    def on_discarded(self, count: int) -> None:
        """Count messages that the server was given and did not take."""
        self.discarded += count

    remaining: list[int] = []  # noqa: RUF012 (replaced by the tests that use it)

    @property
    def server_transport(self) -> Any:
        """Itself: it is its own transport."""
        return self

    def progress(self) -> int | None:
        """Return the bytes that the client has taken, from a list; `None` if the list is empty."""
        return self.remaining.pop(0) if self.remaining else None

    def on_send_delayed(self) -> None:
        """Count a send that waits."""
        self.delayed_sends += 1

    def on_send_failed(self, error: Exception) -> None:
        """Record the failure and discard the outbox, as a connection does."""
        self.failures.append(error)
        if self.outbox is not None:
            self.discarded += self.outbox.discard()


class Post:
    """An outbox with its owner and its server."""

    def __init__(
        self,
        max_messages: int = 3,
        max_bytes: int = 1000,
        send_timeout: float = 5.0,
        *,
        inline: bool = True,
        sends: CallbackSemaphore | None = None,
    ) -> None:
        self.inline = inline
        self.sends = CallbackSemaphore(100) if sends is None else sends
        self.server = FakeServer()
        self.owner = Owner()
        self.tasks = TaskSet(lambda _, error: None)
        self.outbox = self.make(max_messages=max_messages, max_bytes=max_bytes, send_timeout=send_timeout)
        self.owner.outbox = self.outbox
        self.outbox.open()

    def make(self, *, max_messages: int, max_bytes: int, send_timeout: float, **config: Any) -> AsgiOutbox:
        """Return an outbox that is not open yet."""
        limits = OutboxLimits(
            WebSocketConfig(
                outbox_max_messages=max_messages, outbox_max_bytes=max_bytes, send_timeout=send_timeout, **config
            ),
            self.owner.counters,
        )
        return AsgiOutbox(
            self.owner,
            limits,
            FlushScheduler(1, EventBus()),
            0,
            send=self.server.send,
            inline=self.inline,
            writers=WriterPool(self.tasks, self.sends, CallbackSemaphore(100)),
        )

    def waiting(self, text: str) -> asyncio.Future[bool]:
        """Start to put a message that waits for room."""

        async def put() -> bool:
            return await self.outbox.put_wait(encode(text)) is not None

        return asyncio.ensure_future(put())

    async def stall_with(self, *texts: str) -> None:
        """Block the server, so that the first message is stalled and the others wait behind it."""
        self.server.block()
        for number, text in enumerate(texts):
            assert self.outbox.put(encode(text))
            if number == 0:
                await self.server.until(lambda: self.server.offered)


@pytest.fixture
async def post() -> AsyncIterator[Callable[..., Post]]:
    """Return a factory of posts; their tasks are cancelled at the end."""
    made: list[Post] = []

    def make(**kwargs: Any) -> Post:
        made.append(Post(**kwargs))
        return made[-1]

    yield make
    for one in made:
        one.outbox.discard()
        await wait_for_all(one.tasks.cancel(), 2.0)


async def test_messages_are_sent_in_order(post: Any) -> None:
    """The writer sends what was queued, in order, and counts it."""
    p = post(max_messages=10)
    for text in ("a", "b", "c"):
        assert p.outbox.put(encode(text))
    assert (len(p.outbox), p.outbox.held_bytes) == (3, 3)
    await p.server.until(lambda: p.server.data == ["a", "b", "c"])
    await eventually(lambda: p.owner.taken == 3)
    assert (len(p.outbox), p.outbox.held_bytes) == (0, 0)


async def test_empty_outbox_has_no_task(post: Any) -> None:
    """A task exists only while a send waits."""
    p = post()
    p.server.block()
    p.outbox.put(encode("a"))
    assert len(p.tasks) == 0
    await eventually(lambda: len(p.tasks) == 1)
    p.server.release()
    await eventually(lambda: len(p.tasks) == 0)
    assert p.server.data == ["a"]
    p.outbox.put(encode("b"))
    await p.server.until(lambda: p.server.data == ["a", "b"])


async def test_outbox_before_open_accepts_nothing(post: Any) -> None:
    """Before the connection is open nothing can be queued."""
    p = post()
    closed = p.make(max_messages=1, max_bytes=1, send_timeout=1)
    assert not closed.put(encode("a"))
    assert await closed.put_wait(encode("a")) is None


async def test_outbox_is_bounded_by_message_count(post: Any) -> None:
    """At most `max_messages` wait behind the one that is being sent."""
    p = post(max_messages=2)
    await p.stall_with("sending", "a", "b")
    assert not p.outbox.put(encode("c"))
    assert len(p.outbox) == 2


async def test_outbox_is_bounded_by_bytes(post: Any) -> None:
    """At most `max_bytes` wait behind the one that is being sent."""
    p = post(max_messages=100, max_bytes=10)
    await p.stall_with("sending", "12345678")
    assert not p.outbox.put(encode("123"))
    assert p.outbox.put(encode("12"))
    assert p.outbox.held_bytes == 10


async def test_empty_outbox_accepts_message_of_any_size(post: Any) -> None:
    """A message larger than the limit can still be sent on its own."""
    p = post(max_bytes=10)
    await p.stall_with("sending", "x" * 5000)
    assert not p.outbox.put(encode("y"))
    p.server.release()
    await p.server.until(lambda: len(p.server.data) == 2)


async def test_backpressure_starts_above_half_of_bound(post: Any) -> None:
    """An outbox is backpressured when more than half of one of its limits is used."""
    p = post(max_messages=4, max_bytes=100)
    await p.stall_with("sending", "a", "b")
    assert not p.outbox.half_full
    p.outbox.put(encode("c"))
    assert p.outbox.half_full
    q = post(max_messages=100, max_bytes=100)
    await q.stall_with("sending", "x" * 51)
    assert q.outbox.half_full


async def test_put_wait_continues_when_room_appears(post: Any) -> None:
    """`put_wait` waits while the outbox is full, and enqueues as soon as the client takes something."""
    p = post(max_messages=1)
    await p.stall_with("sending", "a")
    sender = p.waiting("b")
    await settle()
    assert not sender.done()
    p.server.release()
    assert await with_deadline(sender)
    await p.server.until(lambda: p.server.data == ["sending", "a", "b"])


async def test_waiting_senders_are_served_in_order(post: Any) -> None:
    """Senders are served in the order in which they began to wait, however many there are."""
    p = post(max_messages=1)
    await p.stall_with("sending", "0")
    senders = [p.waiting(str(number)) for number in range(1, 8)]
    await settle()
    p.server.release()
    assert await with_deadline(asyncio.gather(*senders)) == [True] * 7
    await p.server.until(lambda: p.server.data == ["sending", *"01234567"])


async def test_put_wait_queues_behind_waiting_sender(post: Any) -> None:
    """A `put_wait` during another one's wait queues behind it, even if its own message would fit."""
    p = post(max_messages=10, max_bytes=10)
    await p.stall_with("sending", "123456")
    big = p.waiting("1234567")
    await settle()
    small = p.waiting("1")
    await settle()
    assert not small.done()
    p.server.release()
    assert await with_deadline(asyncio.gather(big, small)) == [True, True]
    await p.server.until(lambda: p.server.data == ["sending", "123456", "1234567", "1"])


async def test_first_waiting_sender_gets_room_despite_its_size(post: Any) -> None:
    """A large message gets in as soon as the queue is below its limits, and those behind it wait."""
    p = post(max_messages=10, max_bytes=10)
    gate = asyncio.Semaphore(0)
    taken: list[Any] = []

    async def one_at_a_time(message: Any) -> None:
        await gate.acquire()
        taken.append(message["text"])

    p.outbox._send = one_at_a_time
    for text in ("sending", "1", "22222", "333"):
        assert p.outbox.put(encode(text))
        await settle()
    big, small = p.waiting("bbbbbbbb"), p.waiting("s")
    await settle()
    assert not big.done()
    gate.release()
    await settle()
    assert big.done()
    assert not small.done()
    assert p.outbox.held_bytes > 10
    for _ in range(10):
        gate.release()
        await settle()
    assert big.result()
    assert small.result()
    assert taken == ["sending", "1", "22222", "333", "bbbbbbbb", "s"]


async def test_cancelled_sender_queues_nothing_and_blocks_no_sender(post: Any) -> None:
    """A sender that is cancelled while it waits has queued nothing, and does not delay others."""
    p = post(max_messages=1)
    await p.stall_with("sending", "a")
    first, second = p.waiting("first"), p.waiting("second")
    await settle()
    first.cancel()
    p.server.release()
    assert await with_deadline(second)
    await p.server.until(lambda: p.server.data == ["sending", "a", "second"])
    assert first.cancelled()


async def test_room_of_cancelled_sender_goes_to_next_sender(post: Any) -> None:
    """When a waiting sender is cancelled, its message is not sent and its turn passes to the next one."""
    p = post(max_messages=1)
    await p.stall_with("sending", "a")
    first, second = p.waiting("first"), p.waiting("second")
    await settle()
    first.cancel()
    await settle()
    p.server.release()
    assert await with_deadline(second)
    assert first.cancelled()


async def test_freed_room_goes_to_waiting_sender_first(post: Any) -> None:
    """The writer hands freed room to waiting senders, so other messages cannot take it."""
    p = post(max_messages=1)
    await p.stall_with("sending", "a")
    waiting = p.waiting("waits")
    await settle()
    p.server.release()
    while not waiting.done():
        p.outbox.put(encode("pushes in"))
        await asyncio.sleep(0)
    assert await with_deadline(waiting)


async def test_finish_flushes_then_closes(post: Any) -> None:
    """Queued messages are sent, then the close frame, and then `done` is set."""
    p = post()
    p.outbox.put(encode("a"))
    assert p.outbox.finish(4408, "bye", flush=True) == 0
    assert not p.outbox.done.done()
    await with_deadline(p.outbox.done)
    assert p.server.taken == [
        {"type": "websocket.send", "text": "a"},
        {"type": "websocket.close", "code": 4408, "reason": "bye"},
    ]


async def test_finish_without_flush_counts_discarded_messages(post: Any) -> None:
    """Without a flush, queued messages are counted as discarded, and only the close frame is sent."""
    p = post()
    await p.stall_with("sending", "a", "b")
    assert p.outbox.finish(4408, "bye", flush=False) == 2
    p.server.release()
    await with_deadline(p.outbox.done)
    assert p.server.data == ["sending"]
    assert p.server.close_frames == [(4408, "bye")]
    assert p.outbox.held_bytes == 0


async def test_finished_outbox_accepts_nothing(post: Any) -> None:
    """After the close has begun nothing can be queued, and a second close changes nothing."""
    p = post()
    p.outbox.finish(1000, "", flush=True)
    assert not p.outbox.put(encode("late"))
    assert await p.outbox.put_wait(encode("late")) is None
    assert p.outbox.finish(4000, "", flush=False) == 0
    await with_deadline(p.outbox.done)
    assert p.server.close_frames == [(1000, "")]


async def test_finish_wakes_waiting_senders(post: Any) -> None:
    """All waiting senders wake up when the outbox closes, and have queued nothing."""
    p = post(max_messages=1)
    await p.stall_with("sending", "a")
    senders = [p.waiting("b"), p.waiting("c")]
    await settle()
    p.outbox.finish(1000, "", flush=True)
    assert await with_deadline(asyncio.gather(*senders)) == [False, False]


async def test_discard_of_idle_outbox_completes_at_once(post: Any) -> None:
    """Without a writer the discard completes immediately."""
    p = post()
    assert p.outbox.discard() == 0
    assert p.outbox.done.done()
    assert p.outbox.discard() == 0


async def test_discard_stops_stalled_send(post: Any) -> None:
    """A discarded outbox sends nothing more, not even the waiting close frame."""
    p = post()
    await p.stall_with("sending", "a")
    p.outbox.finish(1000, "", flush=True)
    assert p.outbox.discard() >= 1
    await with_deadline(p.outbox.done)
    p.server.release()
    await settle()
    assert p.server.taken == []
    assert p.outbox._stall is None


async def test_discard_before_writer_runs_completes(post: Any) -> None:
    """A message and a close in one iteration of the event loop still set `done`."""
    p = post()
    p.outbox.put(encode("a"))
    assert p.outbox.discard() == 1
    await with_deadline(p.outbox.done)
    assert p.server.taken == []


async def test_failed_send_is_reported_and_stops_writer(post: Any) -> None:
    """When the server rejects a message the owner gets the error, and nothing more is sent."""
    p = post()
    error = OSError("gone")
    p.server.fail(error)
    p.outbox.put(encode("a"))
    p.outbox.put(encode("b"))
    await with_deadline(p.outbox.done)
    assert p.owner.failures == [error]
    assert p.owner.taken == 0
    assert len(p.outbox) == 0


async def test_failed_close_frame_is_reported(post: Any) -> None:
    """A close frame that the server rejects does not prevent the end of the connection."""
    p = post()
    p.server.fail(RuntimeError("closed already"))
    p.outbox.finish(1000, "", flush=True)
    await with_deadline(p.outbox.done)
    assert len(p.owner.failures) == 1


async def test_stalled_send_is_reported_once(post: Any) -> None:
    """A send that makes no progress for `send_timeout` is reported."""
    p = post(send_timeout=0.02)
    await p.stall_with("sending")
    await eventually(lambda: p.owner.stuck == 1)
    assert p.owner.taken == 0


async def test_send_with_progress_is_not_stalled(post: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow client makes progress, and `send_timeout` counts from the last progress."""
    monkeypatch.setattr("fastapi_ws_stabilizer.connection.stall_watch.POLL_INTERVAL", 0.02)
    p = post(send_timeout=0.05)
    p.owner.remaining = list(range(20))
    await p.stall_with("sending")
    await eventually(lambda: not p.owner.remaining)
    assert p.owner.stuck == 0
    await eventually(lambda: p.owner.stuck == 1)


async def test_delayed_send_is_reported_before_stall(post: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a send waits the owner is called long before `send_timeout`, so that it can check its transport."""
    monkeypatch.setattr("fastapi_ws_stabilizer.connection.stall_watch.POLL_INTERVAL", 0.01)
    p = post(send_timeout=5)
    await p.stall_with("sending")
    await eventually(lambda: p.owner.delayed_sends >= 2)
    assert p.owner.stuck == 0


async def test_stall_watch_measures_one_send(post: Any) -> None:
    """The watch measures one send, not the whole queue."""
    p = post(max_messages=100, send_timeout=0.2)

    async def slow(_: Any) -> None:
        await asyncio.sleep(0.03)

    p.outbox._send = slow
    for _ in range(12):
        p.outbox.put(encode("x"))
    await eventually(lambda: p.owner.taken == 12)
    assert p.owner.stuck == 0


async def test_stall_watch_stops_without_delayed_send(post: Any) -> None:
    """A while after a delayed send the outbox has no timer."""
    p = post(send_timeout=0.02)
    p.server.block()
    p.outbox.put(encode("a"))
    await eventually(lambda: p.outbox._stall is not None)
    p.server.release()
    await eventually(lambda: p.owner.taken == 1)
    await eventually(lambda: p.outbox._stall is None)
    assert p.owner.stuck == 0


# ── writer slots ──


@pytest.fixture
def long_slot_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a send wait for 60 s before it gives its slot up."""
    for module in (send_watch_module, asgi_outbox_module):
        monkeypatch.setattr(module, "STALL_THRESHOLD", 60.0)


@pytest.mark.usefixtures("long_slot_timeout")
async def test_reading_client_needs_no_writer_slot(post: Any) -> None:
    """With any number of stalled clients for two slots, a client without waiting sends gets all its messages."""
    slots = CallbackSemaphore(2)
    stalled = [post(sends=slots) for _ in range(40)]
    for one in stalled:
        await one.stall_with("stuck")
    await eventually(lambda: slots.taken == 2)
    assert len(slots) == 38
    reading = post(sends=slots, max_messages=10)
    reading.outbox.put(encode("alone"))
    await reading.server.until(lambda: reading.server.data == ["alone"])
    for text in ("several", "at", "once"):
        reading.outbox.put(encode(text))
    await reading.server.until(lambda: reading.server.data == ["alone", "several", "at", "once"])
    assert not reading.outbox.is_stalled


@pytest.mark.usefixtures("long_slot_timeout")
async def test_send_waiting_for_slot_continues_in_order(post: Any) -> None:
    """A begun send that waits for a slot is neither restarted nor overtaken, and its client counts as stalled."""
    slots = CallbackSemaphore(1)
    first, second = post(sends=slots), post(sends=slots)
    await first.stall_with("first")
    await second.stall_with("begun", "behind")
    assert second.outbox.is_stalled
    second.server.release()
    await settle()
    assert second.server.data == []
    first.server.release()
    await second.server.until(lambda: second.server.data == ["begun", "behind"])
    assert [message["text"] for message in second.server.offered] == ["begun", "behind"]
    await eventually(lambda: slots.taken == len(slots) == 0)
    assert not second.outbox.is_stalled


@pytest.mark.usefixtures("long_slot_timeout")
async def test_discard_of_send_waiting_for_slot_counts_message(post: Any) -> None:
    """A discard closes the begun send, counts its message, and leaves the slot to others."""
    slots = CallbackSemaphore(1)
    first, second, third = (post(sends=slots) for _ in range(3))
    await first.stall_with("first")
    begun = second.server.send(encode("begun").message())
    second.outbox._send = lambda _: begun
    await second.stall_with("begun", "behind")
    await third.stall_with("third")
    third.server.release()
    assert second.outbox.discard() == 2
    assert second.outbox.done.done()
    assert inspect.getcoroutinestate(begun) == inspect.CORO_CLOSED
    first.server.release()
    await third.server.until(lambda: third.server.data == ["third"])
    assert second.server.data == []


@pytest.mark.parametrize("inline", [True, False])
async def test_stalled_send_releases_slot(post: Any, inline: bool) -> None:
    """A send that waits for too long gives its slot up, and continues nevertheless."""
    slots = CallbackSemaphore(1)
    stalled, other = post(sends=slots, inline=inline), post(sends=slots, inline=inline)
    await stalled.stall_with("stuck")
    other.server.block()
    other.outbox.put(encode("other"))
    await eventually(lambda: len(slots) == 1)
    other.server.release()
    await other.server.until(lambda: other.server.data == ["other"])
    await eventually(lambda: slots.taken == 0)
    stalled.server.release()
    await stalled.server.until(lambda: stalled.server.data == ["stuck"])
    await settle()
    assert slots.taken == 0


_STEPS = st.lists(st.sampled_from(["put", "big", "wait", "turn", "block", "release", "cancel"]), max_size=40)


@settings(deadline=None, max_examples=60)
@given(_STEPS, st.sampled_from(["flush", "drop", "discard", "fail"]), st.booleans())
def test_every_message_is_sent_or_counted_as_discarded(steps: list[str], end: str, settled: bool) -> None:
    """In any sequence, each message that was taken is sent or counted as discarded in the end."""

    async def play() -> None:
        p = Post(max_messages=4, max_bytes=30)
        accepted = 0
        senders: list[asyncio.Future[bool]] = []
        for step in steps:
            if step == "put":
                accepted += p.outbox.put(encode("x"))
            elif step == "big":
                accepted += p.outbox.put(encode("y" * 25))
            elif step == "wait":
                senders.append(p.waiting("zz"))
            elif step == "turn":
                await settle(2)
            elif step == "block":
                p.server.block()
            elif step == "release":
                p.server.release()
            elif senders:
                senders[-1].cancel()
            waiting = waiting_messages(p.outbox)
            assert len(p.outbox) == len(waiting)
            assert p.outbox.held_bytes == sum(frame.size for frame in waiting)
            assert len(p.outbox) <= 4
        if settled:
            p.server.release()
            await settle()
        if end == "fail":
            p.server.fail(OSError("gone"))
        if end == "discard":
            p.owner.discarded += p.outbox.discard()
        else:
            p.owner.discarded += p.outbox.finish(1000, "", flush=end != "drop")
        p.server.release()
        await settle(100)
        assert p.outbox.done.done()
        assert all(sender.done() for sender in senders)
        accepted += sum(1 for sender in senders if not sender.cancelled() and sender.result())
        cancelled = sum(sender.cancelled() for sender in senders)  # a message that had just been queued is still sent
        assert accepted <= p.owner.taken + p.owner.discarded <= accepted + cancelled
        assert (len(p.outbox), p.outbox.held_bytes) == (0, 0)

    run(play())
