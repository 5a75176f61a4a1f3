"""Tests of the flag that the hot paths of an outbox test instead of its conditions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastapi_ws_stabilizer.config import OutboxOverflow, WebSocketConfig
from fastapi_ws_stabilizer.connection.asgi_outbox import AsgiOutbox, WriterPool
from fastapi_ws_stabilizer.connection.direct_outbox import DirectOutbox
from fastapi_ws_stabilizer.connection.outbox import Outbox, SlowConsumer
from fastapi_ws_stabilizer.connection.send_queue import OutboxLimits
from fastapi_ws_stabilizer.connection.stall_watch import StallWatch
from fastapi_ws_stabilizer.events import Counters, EventBus
from fastapi_ws_stabilizer.scheduling import CallbackSemaphore, FlushScheduler
from fastapi_ws_stabilizer.tasks import TaskSet, wait_for_all
from fastapi_ws_stabilizer.wire.encoded import encode
from tests.support.fake_websocket import FakeServer, settle
from tests.support.own_loop import run


class Owner:
    """Connection of an outbox, which closes it as a connection does."""

    connection_id = "test"
    context = None

    def __init__(self) -> None:
        self.outbox: Any = None

    def on_slow(self, state: SlowConsumer) -> None:
        """Close a connection whose outbox is full."""
        if state is SlowConsumer.DISCONNECTED:
            self.outbox.finish(4507, "", flush=False)

    def on_send_failed(self, _: BaseException) -> None:
        """Do nothing: the disconnect event has not come yet."""

    def on_discarded(self, _: int) -> None:
        """Do nothing."""

    def on_caught_up(self) -> None:
        """Do nothing."""

    def on_send_stalled(self) -> None:
        """Stop sending."""
        self.outbox.discard()

    @property
    def server_transport(self) -> Any:
        """Itself: it is its own transport."""
        return self

    def progress(self) -> int | None:
        """Return no number."""
        return None


class Direct:
    """Direct transport that buffers everything and pauses writing when a test says so."""

    write_paused = False
    window_bits = 0

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.full_after_write = False
        self.sink: Any = None

    @property
    def transport(self) -> Direct:
        """Itself."""
        return self

    def write(self, _: bytes) -> None:
        """Take a frame, and perhaps pause writing."""
        if self.failure is not None:
            raise self.failure
        if self.full_after_write:
            self.sink.pause_writing()

    def close(self, _: int, __: str) -> None:
        """Take the close frame."""


class Rig:
    """An outbox of one kind, and what a test does to it."""

    def __init__(self, kind: str, overflow: OutboxOverflow) -> None:
        self.server = FakeServer()
        self.direct = Direct()
        self.tasks = TaskSet(lambda _, __: None)
        self.senders: list[asyncio.Future[int | None]] = []
        owner: Any = Owner()
        direct: Any = self.direct
        config = WebSocketConfig(outbox_max_messages=4, outbox_max_bytes=30, outbox_overflow=overflow, send_timeout=5)
        limits = OutboxLimits(config, Counters())
        scheduler = FlushScheduler(1, EventBus())
        self.outbox: Any
        if kind == "direct":
            self.outbox = DirectOutbox(owner, limits, scheduler, 0, direct=direct, min_bytes=1)
        else:
            pool = WriterPool(self.tasks, CallbackSemaphore(1), CallbackSemaphore(1))
            self.outbox = AsgiOutbox(
                owner, limits, scheduler, 0, send=self.server.send, inline=kind == "inline", writers=pool
            )
        owner.outbox = self.direct.sink = self.outbox

    async def play(self, step: str) -> None:
        """Do one step."""
        outbox = self.outbox
        steps: dict[str, Callable[[], object]] = {
            "open": lambda: None if outbox._close or outbox.is_done else outbox.open(),
            "offer": lambda: outbox.offer(encode("x")),
            "offer large": lambda: outbox.offer(encode("y" * 25)),
            "offer keyed": lambda: outbox.offer(encode("k", "key")),
            "send": lambda: outbox.try_send(encode("z")),
            "put": lambda: outbox.put(encode("p")),
            "control": lambda: outbox.put_control(encode("pong")),
            "preload": lambda: None if outbox._shut else outbox.preload([encode("welcome"), encode("first")]),
            "deflate": outbox.deflate_frames,
            "wait": lambda: self.senders.append(asyncio.ensure_future(outbox.put_wait(encode("w" * 9)))),
            "wait keyed": lambda: self.senders.append(asyncio.ensure_future(outbox.put_wait(encode("v", "key")))),
            "cancel": lambda: self.senders[-1].cancel() if self.senders else None,
            "flush": outbox.flush,
            "block": self.block,
            "release": self.release,
            "fail": self.fail,
            "finish": lambda: outbox.finish(1000, "", flush=True),
            "finish without flush": lambda: outbox.finish(1000, "", flush=False),
            "discard": outbox.discard,
        }
        if step == "turn":
            await settle(2)
        else:
            steps[step]()

    def block(self) -> None:
        """Accept no more frames."""
        self.server.block()
        self.direct.full_after_write = True

    def release(self) -> None:
        """Accept frames again."""
        self.server.release()
        self.direct.full_after_write = False
        if isinstance(self.outbox, DirectOutbox):
            self.outbox.resume_writing()

    def fail(self) -> None:
        """Reject each frame from now on."""
        self.direct.failure = OSError("gone")
        self.server.fail(self.direct.failure)


def is_clear(outbox: Any) -> bool:
    """Return whether all conditions of the fast path are clear, each read on its own."""
    accounted = outbox._queue is not None and outbox._queue.counted
    conditions = [outbox._shut, outbox._broken, bool(outbox._control), bool(outbox._waiters), outbox._slow, accounted]
    if isinstance(outbox, AsgiOutbox):
        conditions += [not outbox._inline, outbox.blocked_send is not None]
    else:
        conditions += [outbox._paused]
    return not any(conditions)


_STEPS = [
    *("open", "offer", "offer large", "offer keyed", "send", "put", "control", "preload", "deflate"),
    *("wait", "wait keyed", "cancel"),
    *("flush", "block", "release", "fail", "turn", "turn", "turn", "finish", "finish without flush", "discard"),
]


@pytest.mark.parametrize("kind", ["inline", "in a task", "direct"])
@settings(deadline=None, max_examples=150)
@given(st.sampled_from(list(OutboxOverflow)), st.lists(st.sampled_from(_STEPS), max_size=40))
def test_fast_flag_is_set_iff_all_conditions_clear(kind: str, overflow: OutboxOverflow, steps: list[str]) -> None:
    """After any sequence of steps, `fast` is True exactly if no condition stands against the fast path."""

    async def play() -> None:
        rig = Rig(kind, overflow)
        assert rig.outbox.fast is is_clear(rig.outbox) is False
        rig.outbox.open()
        for step in steps:
            await rig.play(step)
            assert rig.outbox.fast is is_clear(rig.outbox), step
        rig.release()
        rig.outbox.discard()
        await wait_for_all([*rig.senders, *rig.tasks.cancel()], 2.0)
        await settle()

    run(play())


@pytest.mark.parametrize("kind", ["inline", "direct"])
async def test_outbox_is_fast_again_after_client_caught_up(kind: str) -> None:
    """A stall, a waiting sender and a dropped message end the fast path, and it begins again once all is sent."""
    rig = Rig(kind, OutboxOverflow.DROP_OLDEST)
    rig.outbox.open()
    rig.block()
    for _ in range(12):
        await rig.play("offer")
    await rig.play("turn")
    for _ in range(12):
        await rig.play("offer")
    await rig.play("wait")
    assert not rig.outbox.fast
    rig.release()
    await settle()
    assert rig.outbox.fast
    assert rig.outbox._queue is None


async def test_idle_outbox_owns_no_queue_and_no_watch() -> None:
    """The queue and the stall watch exist only while frames wait for the client."""
    rig = Rig("direct", OutboxOverflow.DISCONNECT)
    outbox: Outbox = rig.outbox
    outbox.open()
    outbox.offer(encode("alone"))
    assert (outbox._queue, outbox._stall) == (None, None)
    outbox.offer(encode("second"))
    assert outbox._queue is not None
    await settle()
    assert outbox._queue is None
    rig.direct.full_after_write = True
    outbox.offer(encode("fills the transport"))
    await settle()
    assert outbox._queue is not None
    assert outbox._stall is not None
    rig.release()
    assert outbox._queue is None


async def test_send_in_task_that_does_not_block_is_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A send in a writer task gets a queue, accounting, a stall watch and a timer only if it blocks."""
    begin, watches = StallWatch.begin, list[StallWatch]()
    monkeypatch.setattr(StallWatch, "begin", lambda watch: (watches.append(watch), begin(watch)))
    rig = Rig("in a task", OutboxOverflow.DISCONNECT)
    rig.outbox.open()
    for _ in range(3):
        await rig.play("offer")
        await settle()
    assert rig.outbox.limits.counters.messages_sent == 3
    assert (watches, rig.outbox._queue, rig.outbox._stall, len(rig.tasks)) == ([], None, None, 0)
    rig.block()
    await rig.play("offer")
    await settle()
    assert len(watches) == 1
    assert rig.outbox._queue.counted
    rig.release()
    await settle()
    assert (rig.outbox._queue, len(rig.tasks)) == (None, 0)
