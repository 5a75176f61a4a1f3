"""Tests of the received messages that the endpoint has not read yet."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic_core import from_json

from fastapi_ws_stabilizer.connection.inbox import Inbox, InboxClosed, InboxLimits
from fastapi_ws_stabilizer.errors import ConcurrentReceiveError
from fastapi_ws_stabilizer.memory.budget import MemoryBudget
from fastapi_ws_stabilizer.wire.v1.frames import message_of
from tests.support.fake_websocket import settle, with_deadline
from tests.support.own_loop import run


def make(max_messages: int = 3, max_bytes: int = 10_000) -> Inbox:
    """Return a small inbox."""
    return Inbox(InboxLimits(max_messages, max_bytes))


async def test_messages_are_read_in_order() -> None:
    """Messages are read in the order of arrival, text and bytes unchanged."""
    inbox = make()
    inbox.put("one")
    inbox.put(b"two")
    assert [await inbox.get(), await inbox.get()] == ["one", b"two"]
    assert (len(inbox), inbox.held_bytes) == (0, 0)


async def test_message_wakes_waiting_reader() -> None:
    """A waiting reader gets the message on arrival."""
    inbox = make()
    reader = asyncio.ensure_future(inbox.get())
    await settle()
    inbox.put("one")
    inbox.put("two")
    assert await with_deadline(reader) == "one"
    assert await inbox.get() == "two"


async def test_closed_inbox_returns_queued_messages_first() -> None:
    """A closed inbox returns its messages, and only then reports that it is closed."""
    inbox = make()
    inbox.put("one")
    assert inbox.close(discard=False) == 0
    assert await inbox.get() == "one"
    with pytest.raises(InboxClosed) as caught:
        await inbox.get()
    assert not caught.value.waited


async def test_discarded_inbox_is_empty_and_counts_messages() -> None:
    """Discarded messages are counted."""
    inbox = make()
    inbox.put("one")
    inbox.put("two")
    assert inbox.close(discard=True) == 2
    assert (len(inbox), inbox.held_bytes) == (0, 0)
    with pytest.raises(InboxClosed):
        await inbox.get()


async def test_close_wakes_waiting_reader() -> None:
    """A waiting reader wakes up when the inbox closes."""
    inbox = make()
    reader = asyncio.ensure_future(inbox.get())
    await settle()
    inbox.close(discard=False)
    with pytest.raises(InboxClosed) as caught:
        await with_deadline(reader)
    assert caught.value.waited


async def test_second_close_wakes_reader_only_once() -> None:
    """A second message or close before the woken reader runs has no effect on it."""
    inbox = make()
    reader = asyncio.ensure_future(inbox.get())
    await settle()
    inbox.put("one")
    inbox.close(discard=False)
    inbox.close(discard=False)
    assert await with_deadline(reader) == "one"


async def test_cancelled_reader_loses_no_message() -> None:
    """A reader that is cancelled after it was woken takes no message."""
    inbox = make()
    reader = asyncio.ensure_future(inbox.get())
    await settle()
    inbox.put("one")
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert await with_deadline(inbox.get()) == "one"


async def test_reader_timeout_loses_no_message() -> None:
    """`asyncio.wait_for` around a read can be repeated without a gap."""
    inbox = make()
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(inbox.get(), 0.01)
    inbox.put("one")
    assert await asyncio.wait_for(inbox.get(), 1.0) == "one"


async def test_second_reader_raises() -> None:
    """Two concurrent readers would each get a part of the messages, so the second raises."""
    inbox = make()
    reader = asyncio.ensure_future(inbox.get())
    await settle()
    with pytest.raises(ConcurrentReceiveError, match="already receiving"):
        await inbox.get()
    inbox.put("one")
    assert await with_deadline(reader) == "one"


async def test_inbox_is_full_by_count_or_bytes() -> None:
    """An inbox is full by count or by bytes; the message that reaches the limit is accepted."""
    by_number, by_size = make(max_messages=2), make(max_bytes=500)
    by_number.put("a")
    assert not by_number.full
    by_number.put("b")
    assert by_number.full
    by_size.put("x" * 1000)
    assert by_size.full
    assert len(by_size) == 1


async def test_read_that_makes_room_wakes_waiter() -> None:
    """Waiting for room ends with the read that makes enough room."""
    inbox = make(max_messages=2)
    for text in ("a", "b", "c"):
        inbox.put(text)
    room = asyncio.ensure_future(inbox.wait_for_room())
    await settle()
    await inbox.get()
    await settle()
    assert not room.done()
    await inbox.get()
    await with_deadline(room)
    assert not inbox.full


async def test_wait_for_room_below_limit_returns_at_once() -> None:
    """Waiting below the limit does not yield."""
    inbox = make()
    await with_deadline(inbox.wait_for_room())
    assert not inbox.full


async def test_close_wakes_wait_for_room() -> None:
    """Closing a full inbox ends the wait for room, so that the pump can finish."""
    inbox = make(max_messages=1)
    inbox.put("a")
    room = asyncio.ensure_future(inbox.wait_for_room())
    await settle()
    inbox.close(discard=False)
    await with_deadline(room)
    assert inbox.full
    await with_deadline(inbox.wait_for_room())


async def test_cancelled_wait_for_room_leaves_inbox_usable() -> None:
    """After a cancelled wait the next one works."""
    inbox = make(max_messages=1)
    inbox.put("a")
    room = asyncio.ensure_future(inbox.wait_for_room())
    await settle()
    room.cancel()
    await settle()
    again = asyncio.ensure_future(inbox.wait_for_room())
    await settle()
    assert await inbox.get() == "a"
    await with_deadline(again)
    assert room.cancelled()


async def test_message_frees_size_counted_on_arrival() -> None:
    """A str grows when its UTF-8 is cached, but the account frees what it counted on arrival."""
    inbox = make()
    text = '"' + "grün€" * 50 + '"'
    inbox.put(text)
    from_json(text)
    await inbox.get()
    assert inbox.held_bytes == 0


@given(st.lists(st.one_of(st.binary(max_size=50), st.text(max_size=50), st.just(None)), max_size=40), st.booleans())
def test_account_matches_after_random_operations(steps: list[str | bytes | None], discard: bool) -> None:
    """Every message was read, is held, or was counted as discarded; the bytes are those of the held messages."""

    async def play() -> None:
        inbox = make(max_messages=5, max_bytes=300)
        held: list[str | bytes] = []
        for step in steps:
            if step is not None:
                inbox.put(step)
                held.append(step)
            elif held:
                assert await inbox.get() == held.pop(0)
            assert len(inbox) == len(held)
            assert (inbox.held_bytes == 0) == (not held)
            assert inbox.full == (len(held) >= 5 or inbox.held_bytes >= 300)
        assert inbox.close(discard=discard) == (len(held) if discard else 0)
        assert len(inbox) == (0 if discard else len(held))

    run(play())


async def test_transferred_inbox_drops_nothing_for_next_reader() -> None:
    """The reads of the previous reader, and its `ignore_messages`, do not apply to the next one."""
    inbox = Inbox(InboxLimits(2, 1000))
    inbox.put("one")
    await inbox.get()
    inbox.drop_when_full()
    inbox.transfer()
    assert not inbox.drops
    assert inbox.reads == 0
    inbox.drop_when_full()
    assert inbox.drops


@pytest.mark.parametrize("others", [0, 1, 2])
async def test_requests_are_removed_from_inbox(others: int) -> None:
    """Only requests are removed, and their memory is released."""
    budget = MemoryBudget()
    inbox = Inbox(InboxLimits(10, 10_000, budget))
    for number in range(others):
        inbox.put(str(number))
    before = (inbox.held_bytes, budget.total)
    request = message_of({"type": "msg", "event": "ask", "id": "1", "data": 1})
    inbox.put(request, 50)
    assert inbox.take_requests() == [request]
    assert inbox.take_requests() == []
    assert (inbox.held_bytes, budget.total) == before
    inbox.put("last")
    assert inbox.unread() == [*map(str, range(others)), "last"]
