"""Tests of the overflow policies of an outbox, and of coalescing."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastapi_ws_stabilizer.close_codes import DisconnectReason
from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.connection import stall_watch as send_watch_module
from fastapi_ws_stabilizer.connection.outbox import SlowConsumer
from fastapi_ws_stabilizer.connection.send_queue import OutboxLimits, SendQueue
from fastapi_ws_stabilizer.errors import SocketClosed
from fastapi_ws_stabilizer.events import Counters
from fastapi_ws_stabilizer.queueing import EnqueueResult
from fastapi_ws_stabilizer.wire.encoded import encode
from tests.support.fake_websocket import FakeServer, eventually, settle, with_deadline


@pytest.fixture
async def stalled(bench: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a connection with a stalled first message, so that all others wait in the outbox."""
    monkeypatch.setattr(send_watch_module, "STALL_THRESHOLD", -1.0)

    async def make(**options: Any) -> Any:
        b = bench(outbox_max_messages=4, **options)
        await b.open()
        b.server.block()
        b.connection.outbox.offer(encode("stuck"))
        await b.server.until(lambda: len(b.server.offered) == 2)
        return b

    return make


def offer(b: Any, *texts: str, key: Any = None) -> list[EnqueueResult]:
    return [b.connection.outbox.offer(encode(text, key)) for text in texts]


async def test_drop_oldest_discards_and_counts_oldest(stalled: Any) -> None:
    """The messages that have waited longest are dropped and counted."""
    b = await stalled(outbox_overflow="drop_oldest")
    assert offer(b, *"abcdef")[-1] is EnqueueResult.SLOW
    b.server.release()
    await b.server.until(lambda: b.server.data == ["stuck", "c", "d", "e", "f"])
    assert b.events.counters.messages_dropped == b.connection.dropped_messages == 2
    assert b.connection.close_info is None


async def test_drop_newest_discards_and_counts_newest(stalled: Any) -> None:
    """Queued messages stay, and messages without room are counted."""
    b = await stalled(outbox_overflow="drop_newest")
    assert offer(b, *"abcdef")[-2:] == [EnqueueResult.DROPPED, EnqueueResult.DROPPED]
    b.server.release()
    await b.server.until(lambda: b.server.data == ["stuck", "a", "b", "c", "d"])
    assert b.events.counters.messages_dropped == 2


async def test_disconnect_policy_closes_with_4507(stalled: Any) -> None:
    """The close code tells the client that it has missed messages."""
    b = await stalled()
    assert offer(b, *"abcde")[-1] is EnqueueResult.CLOSED
    assert b.connection.close_info.cause is DisconnectReason.SLOW_CONSUMER
    assert b.listener.slow == [SlowConsumer.LAGGING, SlowConsumer.DISCONNECTED]


async def test_slowness_level_is_reported_once_until_drained(stalled: Any) -> None:
    """Lagging and dropping are reported once each, and again after the client has caught up."""
    b = await stalled(outbox_overflow="drop_newest")
    offer(b, *"abcdefgh")
    assert b.listener.slow == [SlowConsumer.LAGGING, SlowConsumer.DROPPING]
    b.server.release()
    await eventually(lambda: "client_caught_up" in b.heard.events)
    b.server.block()
    offer(b, "stuck again")
    await b.server.until(lambda: b.server.offered[-1].get("text") == "stuck again")
    offer(b, *"abcd")
    assert b.listener.slow == [SlowConsumer.LAGGING, SlowConsumer.DROPPING, SlowConsumer.LAGGING]
    assert b.events.counters.slow_clients == {SlowConsumer.LAGGING: 2, SlowConsumer.DROPPING: 1}


async def test_keyed_message_replaces_queued_message(stalled: Any) -> None:
    """Only the newest message of a key is sent, in the position of the first; other messages are unaffected."""
    b = await stalled()
    offer(b, "p1", key="price")
    offer(b, "other")
    offer(b, "c1", key=("cursor", 7))
    offer(b, "p2", "p3", key="price")
    b.server.release()
    await b.server.until(lambda: b.server.data == ["stuck", "p3", "other", "c1"])
    assert b.events.counters.messages_coalesced == 2
    offer(b, "p4", key="price")
    await b.server.until(lambda: b.server.data[-1] == "p4")


async def test_keyed_message_replaces_message_of_waiting_sender(stalled: Any) -> None:
    """The sender returns as if its message were queued, and the client gets the newer one in its position."""
    b = await stalled()
    offer(b, *"abcd")
    senders = [
        asyncio.ensure_future(b.connection.send(encode(text, key)))
        for text, key in (("first", None), ("p1", "price"), ("last", None))
    ]
    await settle()
    assert not any(sender.done() for sender in senders)
    assert offer(b, "p2", "p3", key="price") == [EnqueueResult.SLOW, EnqueueResult.SLOW]
    assert b.connection.outbox.put(encode("p4", "price"))
    b.server.release()
    await with_deadline(asyncio.gather(*senders))
    await b.server.until(lambda: b.server.data == ["stuck", *"abcd", "first", "p4", "last"])
    assert b.events.counters.messages_coalesced == 3


async def test_waiting_senders_with_same_key_coalesce(stalled: Any) -> None:
    """Only the newest message of a key is sent, and all its senders return when it is queued."""
    b = await stalled()
    offer(b, *"abcd")
    senders = [asyncio.ensure_future(b.connection.send(encode(f"p{number}", "price"))) for number in range(5)]
    await settle()
    assert not any(sender.done() for sender in senders)
    b.server.release()
    await with_deadline(asyncio.gather(*senders))
    await b.server.until(lambda: b.server.data == ["stuck", *"abcd", "p4"])
    assert b.events.counters.messages_coalesced == 4


@pytest.mark.parametrize("cancelled", [[0], [1], [0, 1]])
async def test_message_of_two_senders_is_discarded_if_both_are_cancelled(stalled: Any, cancelled: list[int]) -> None:
    """A message that has replaced that of another sender is still sent if only one of the calls is cancelled."""
    b = await stalled()
    offer(b, *"abcd")
    senders = [asyncio.ensure_future(b.connection.send(encode(f"p{number}", "price"))) for number in range(2)]
    await settle()
    for number in cancelled:
        senders[number].cancel()
    await settle()
    b.server.release()
    await with_deadline(asyncio.gather(*senders, return_exceptions=True))
    assert [sender.cancelled() for sender in senders] == [number in cancelled for number in range(2)]
    offer(b, "end")
    expected = [] if len(cancelled) == 2 else ["p1"]
    await b.server.until(lambda: b.server.data == ["stuck", *"abcd", *expected, "end"])


@pytest.mark.parametrize(
    ("overflow", "got", "dropped", "discarded"),
    [
        ("drop_oldest", ["stuck", *"bcd", "offered"], 1, 0),
        ("drop_newest", ["stuck", *"abcd"], 1, 0),
        ("disconnect", ["stuck"], 0, 5),
    ],
)
async def test_offered_message_survives_cancelled_sender(
    stalled: Any, overflow: str, got: list[str], dropped: int, discarded: int
) -> None:
    """An offered message has replaced that of a sender that waits. If that is cancelled, it is offered again."""
    b = await stalled(outbox_overflow=overflow)
    offer(b, *"abcd")
    sender = asyncio.ensure_future(b.connection.send(encode("sent", "price")))
    await settle()
    assert offer(b, "offered", key="price") == [EnqueueResult.SLOW]
    sender.cancel()
    await settle()
    assert sender.cancelled()
    b.server.release()
    await b.server.until(lambda: b.server.data == got)
    counters = b.events.counters
    assert (counters.messages_dropped, counters.messages_discarded) == (dropped, discarded)
    assert (b.connection.close_info is not None) == (overflow == "disconnect")


async def test_offered_message_of_waiting_sender_counts_as_discarded(stalled: Any) -> None:
    """At the end of a connection, an offered message that has replaced that of a waiting sender is counted."""
    b = await stalled()
    offer(b, *"abcd")
    senders = [asyncio.ensure_future(b.connection.send(encode("sent", key))) for key in ("price", "other")]
    await settle()
    offer(b, "offered", key="price")
    b.server.feed_disconnect(1001)
    failures = await with_deadline(asyncio.gather(*senders, return_exceptions=True))
    assert [type(failure) for failure in failures] == [SocketClosed, SocketClosed]
    assert b.events.counters.messages_discarded == len(["stuck", *"abcd", "offered"])


def test_preloaded_messages_use_no_room_of_replacement() -> None:
    """A newer message may be larger than the one that it replaces, as if the replayed messages were not there."""
    queue = SendQueue(OutboxLimits(WebSocketConfig(outbox_max_bytes=10), Counters()))
    for _ in range(10):
        queue.append(encode("replayed"))
    queue.allow_extra()
    queue.append(encode("p1", "price"))
    assert queue.coalesce(encode("p1000", "price"))
    assert not queue.coalesce(encode("p1000000000", "price"))
    assert [frame.text for frame in queue.pop_up_to(1000)] == ["replayed"] * 10 + ["p1000"]


async def test_waiting_sender_is_not_starved_by_small_messages(bench: Any) -> None:
    """A waiting sender gets freed room as soon as the queue is below its limits, even if others keep filling it."""
    b = bench(outbox_max_bytes=100, outbox_overflow="drop_newest")
    await b.open()
    taken: list[str] = []
    gate = asyncio.Semaphore(0)

    async def one_at_a_time(message: Any) -> None:
        await gate.acquire()
        taken.append(message["text"])

    b.connection.outbox._send = one_at_a_time

    def fill_up() -> None:
        while offer(b, "0123456789") != [EnqueueResult.DROPPED]:
            pass

    offer(b, "first")
    await settle()
    fill_up()
    sender = asyncio.ensure_future(b.connection.send(encode("x" * 60)))
    await settle()
    for _ in range(2):
        fill_up()
        gate.release()
        await eventually(lambda: not gate._value)
        fill_up()
        await settle()
    await eventually(sender.done)
    for _ in range(20):
        gate.release()
    await eventually(lambda: "x" * 60 in taken)


async def test_replacing_message_counts_lagging_client_as_slow(
    manager_with: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broadcast reports how many clients lag, whether its message was added or has replaced one."""
    monkeypatch.setattr(send_watch_module, "STALL_THRESHOLD", -1.0)
    manager, _ = manager_with(outbox_max_messages=4)
    server = FakeServer()
    await manager.connect("ann", await server.accepted())
    server.block()
    await manager.broadcast("stuck")
    await server.until(lambda: len(server.offered) == 2)
    assert [(await manager.broadcast("p", coalesce_key="price")).slow for _ in range(3)] == [0, 0, 0]
    await manager.broadcast("a")
    assert (await manager.broadcast("b")).slow == 1
    result = await manager.broadcast("p", coalesce_key="price")
    assert (result.total, result.succeeded, result.slow) == (1, 1, 1)
    assert manager.counters.messages_coalesced == 3
    server.release()


async def test_control_frames_precede_messages(stalled: Any) -> None:
    """A control frame is sent before queued messages."""
    b = await stalled()
    offer(b, "a", "b")
    b.connection.answer(encode("pong"))
    b.server.release()
    await b.server.until(lambda: b.server.data == ["stuck", "pong", "a", "b"])


def test_unhashable_key_raises_in_caller() -> None:
    """An unhashable key raises before anything is queued."""
    with pytest.raises(TypeError):
        encode("x", ["no", "key"])


_STEPS = st.lists(
    st.tuples(st.sampled_from(["put", "put", "put", "pop", "some", "all"]), st.sampled_from([None, "k", "l"])),
    max_size=200,
)


@settings(deadline=None, max_examples=300)
@given(_STEPS)
def test_send_queue_matches_list_model(steps: list[tuple[str, str | None]]) -> None:
    """With any operations, order, length, bytes and positions of keys equal those of a plain list."""
    queue = SendQueue(OutboxLimits(WebSocketConfig(outbox_max_messages=10), Counters()))
    model: list[Any] = []
    for number, (step, key) in enumerate(steps):
        if step == "put":
            frame = encode("x" * (number % 7), key)
            old = [position for position, one in enumerate(model) if key is not None and one.key == key]
            if key is not None and queue.coalesce(frame):
                model[old[-1]] = frame
            else:
                assert not old
                queue.append(frame)
                model.append(frame)
        elif model and step == "pop":
            assert queue.pop() is model.pop(0)
        elif model:
            taken = queue.pop_up_to(5 if step == "some" else 10**9)
            assert list(taken) == model[: len(taken)]
            assert taken
            del model[: len(taken)]
        assert len(queue) == len(model)
        assert queue.held_bytes == sum(frame.size for frame in model)


async def test_outbox_queues_for_writer_slot_once(bench: Any) -> None:
    """However often messages are offered, the outbox queues for a slot once, and gets it when a slot is free."""
    b = bench(outbox_max_messages=4, outbox_overflow="drop_oldest", max_concurrent_broadcast=1)
    await b.open()
    slots = b.connection.outbox.writers.sends
    slots.take()
    offer(b, *(str(number) for number in range(100)))
    await settle()
    offer(b, *(str(number) for number in range(100)))
    assert len(slots) == 1
    assert b.server.data == []
    slots.release()
    await b.server.until(lambda: b.server.data == ["96", "97", "98", "99"])
    assert slots.taken == 0
