"""Tests of messages with a `coalesce_key` to sessions: which are replaced, and which numbers the client sees."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastapi_ws_stabilizer.errors import SocketClosed
from fastapi_ws_stabilizer.sessions.v1_protocol import V1Protocol
from fastapi_ws_stabilizer.wire.v1.frames import SUBPROTOCOL, parse
from tests.support.fake_link import soon, virtually
from tests.support.fake_websocket import with_deadline
from tests.support.stage import Line, Peer, Stage
from tests.support.virtual_time import run_virtually


async def blocked(stage: Stage, peer: Peer) -> Line:
    """Connect a client whose server takes no message any more: one is being sent, and later ones are queued."""
    line = await peer.dial()
    line.server.block()
    await stage.manager.send_to_client("ann", "in flight")
    await soon()
    return line


async def offer(stage: Stage, *values: Any, key: Any = "price") -> None:
    """Send values to the client, connected or not."""
    for value in values:
        assert await stage.manager.send_to_client("ann", value, coalesce_key=key)


# ── connected ──


@virtually
async def test_queued_message_of_session_is_replaced() -> None:
    """The newest value replaces the queued one and has its number, and the client's count stays right."""
    async with Stage() as stage:
        line = await blocked(stage, Peer(stage))
        await offer(stage, 1)
        await offer(stage, "other", key=None)
        await offer(stage, 2, 3)
        sending = asyncio.ensure_future(stage.socket().send("last", ack=True))
        await soon()
        line.server.release()
        await soon()
        assert line.got == ["in flight", 3, "other", "last"]
        assert line.of("ping")[-1]["seq"] == 4
        assert stage.manager.counters.messages_coalesced == 2
        await line.say({"type": "ack", "seq": 4})
        await with_deadline(sending)


@virtually
async def test_message_in_flight_is_not_replaced() -> None:
    """A message that was handed to the server keeps its number and its content."""
    async with Stage() as stage:
        line = await Peer(stage).dial()
        line.server.block()
        await offer(stage, 1)
        await soon()
        await offer(stage, 2)
        assert [frame.text for frame in stage.socket()._connection.protocol.session.buffer.entries] == [
            '{"type":"msg","data":1}',
            '{"type":"msg","data":2}',
        ]
        line.server.release()
        await soon()
        assert line.got == [1, 2]
        assert stage.manager.counters.messages_coalesced == 0


@virtually
async def test_volatile_and_numbered_messages_replace_only_their_kind() -> None:
    """A volatile message replaces no numbered one with its key, and a numbered one no volatile one."""
    async with Stage() as stage:
        line = await blocked(stage, Peer(stage))
        for number in range(3):
            await stage.manager.send_to_client("ann", ["volatile", number], coalesce_key="k", volatile=True)
            await stage.manager.send_to_client("ann", ["numbered", number], coalesce_key="k")
        line.server.release()
        await soon()
        assert line.got == ["in flight", ["volatile", 2], ["numbered", 2]]


@virtually
async def test_replacement_that_does_not_fit_is_queued_behind() -> None:
    """A newer value that is too large to replace the older one gets a number of its own."""
    async with Stage(outbox_max_bytes=300) as stage:
        line = await blocked(stage, Peer(stage))
        await offer(stage, "y" * 100, key=None)
        await offer(stage, "x" * 100)
        sending = asyncio.ensure_future(stage.socket().send("z" * 200, coalesce_key="price"))
        await soon()
        assert not sending.done()
        line.server.release()
        await with_deadline(sending)
        await soon()
        assert line.got == ["in flight", "y" * 100, "x" * 100, "z" * 200]


# ── senders that wait ──


@virtually
async def test_acks_of_replaced_messages_wait_for_newer_one() -> None:
    """`ack=True` returns when the client has acknowledged the newer value that has taken the number."""
    async with Stage() as stage:
        line = await blocked(stage, Peer(stage))
        sending = [
            asyncio.ensure_future(stage.socket().send(number, coalesce_key="price", ack=True)) for number in range(3)
        ]
        await soon()
        await offer(stage, 3)
        line.server.release()
        await soon()
        assert line.got == ["in flight", 3]
        await line.say({"type": "ack", "seq": 1})
        assert not any(one.done() for one in sending)
        await line.say({"type": "ack", "seq": 2})
        await with_deadline(asyncio.gather(*sending))


@virtually
async def test_waiting_senders_of_session_share_number_of_newest() -> None:
    """Senders of one key that wait for room get the number of the newest message, the only one that is sent."""
    async with Stage(outbox_max_messages=2) as stage:
        line = await blocked(stage, Peer(stage))
        await offer(stage, "a", "b", key=None)
        socket = stage.socket()
        sending = [asyncio.ensure_future(socket.send(number, coalesce_key="price", ack=True)) for number in range(3)]
        await soon()
        line.server.release()
        await soon()
        assert line.got == ["in flight", "a", "b", 2]
        assert stage.manager.counters.messages_coalesced == 2
        await line.say({"type": "ack", "seq": 3})
        assert not any(one.done() for one in sending)
        await line.say({"type": "ack", "seq": 4})
        await with_deadline(asyncio.gather(*sending))


@virtually
async def test_offered_message_replaces_waiting_one() -> None:
    """A value that is offered takes over from a sender that waits for room, and is stored if the outbox is full."""
    async with Stage(outbox_max_messages=2) as stage:
        peer = Peer(stage)
        line = await blocked(stage, peer)
        await offer(stage, "a", "b", key=None)
        sending = asyncio.ensure_future(stage.socket().send(1, coalesce_key="price"))
        await soon()
        assert not sending.done()
        await offer(stage, 2)
        await with_deadline(sending)
        line.server.release()
        await soon()
        assert line.close_code == 4507
        await line.leaves()
        line = await peer.dial(seq=1)
        assert (line.outcome, line.got) == ("full", ["a", "b", 2])


@virtually
async def test_sender_whose_connection_closes_awaits_ack_of_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A newer value takes over from a sender and finds no room. The closing connection asks for no acknowledgement."""
    requests = list[V1Protocol]()
    monkeypatch.setattr(V1Protocol, "_send_ack_request", lambda protocol: requests.append(protocol))
    async with Stage(outbox_max_messages=2) as stage:
        peer = Peer(stage)
        line = await blocked(stage, peer)
        await offer(stage, "a", "b", key=None)
        sending = asyncio.ensure_future(stage.socket().send(1, coalesce_key="price", ack=True))
        await soon()
        await offer(stage, 2)
        await soon()
        assert requests == []
        line.server.release()
        await line.leaves()
        line = await peer.dial(seq=1)
        assert (line.outcome, line.got) == ("full", ["a", "b", 2])
        assert not sending.done()
        await line.say({"type": "ack", "seq": 4})
        await with_deadline(sending)


@virtually
async def test_cancelled_sender_keeps_message_of_another() -> None:
    """Two senders wait with one message. It is discarded when both are cancelled, but not before."""
    async with Stage(outbox_max_messages=2) as stage:
        line = await blocked(stage, Peer(stage))
        await offer(stage, "a", "b", key=None)
        socket = stage.socket()
        first, second = (asyncio.ensure_future(socket.send(n, coalesce_key="sent")) for n in (1, 2))
        others = [asyncio.ensure_future(socket.send(n, coalesce_key="dropped")) for n in (3, 4)]
        await soon()
        for one in (first, *others):
            one.cancel()
        await soon()
        line.server.release()
        await with_deadline(second)
        await soon()
        assert line.got == ["in flight", "a", "b", 2]


@virtually
async def test_cancelled_sender_of_volatile_message_ends_no_session() -> None:
    """A volatile message without room is dropped and counted, also if it had replaced that of a cancelled sender."""
    async with Stage(outbox_max_messages=2) as stage:
        line = await blocked(stage, Peer(stage))
        await offer(stage, "a", "b", key=None)
        sending = asyncio.ensure_future(stage.socket().send("sent", coalesce_key="k", volatile=True))
        await soon()
        assert await stage.manager.send_to_client("ann", "offered", coalesce_key="k", volatile=True)
        sending.cancel()
        await soon()
        assert stage.manager.counters.messages_dropped == 1
        line.server.release()
        await soon()
        assert (line.got, line.close_code) == (["in flight", "a", "b"], None)


# ── away ──


@virtually
async def test_detached_session_stores_newest_of_each_key() -> None:
    """A client that was away gets one message of each key, in the order of the first ones, and no gap."""
    async with Stage() as stage:
        peer = Peer(stage)
        line = await peer.dial()
        session = stage.socket()._connection.protocol.session
        await line.leaves()
        for number in range(3000):
            await offer(stage, ["price", number])
            await offer(stage, ["cursor", number], key=("cursor", 7))
        await offer(stage, "note", key=None)
        assert len(session.buffer.entries) == 3
        line = await peer.dial(seq=0)
        assert line.outcome == "full"
        assert line.got == [["price", 2999], ["cursor", 2999], "note"]
        assert stage.manager.counters.messages_coalesced == 2 * 2999


@virtually
async def test_message_of_lost_connection_is_not_replaced() -> None:
    """A value that was queued in a lost connection may have been sent, so a newer one gets a number of its own."""
    async with Stage() as stage:
        peer = Peer(stage)
        line = await peer.dial()
        await offer(stage, 1)
        await soon()
        await line.leaves()
        await offer(stage, 2, 3)
        line = await peer.dial(seq=0)
        assert line.got == [1, 3]


@virtually
async def test_replayed_message_is_not_replaced() -> None:
    """What a resume replays keeps its content, even while it is queued."""
    async with Stage() as stage:
        peer = Peer(stage)
        line = await peer.dial()
        await line.leaves()
        await offer(stage, 1)
        line = Line(stage, subprotocols=(SUBPROTOCOL,))
        await soon()
        line.server.block()  # the welcome is in flight, and the replayed message is queued
        resume = {"token": peer.token, "seq": 0}
        await line.say({"type": "hello", "v": 1, "n": 2, "client": peer.instance, "resume": resume})
        await offer(stage, 2, 3)
        line.server.release()
        await soon()
        assert line.got == [1, 3]


# ── any interleaving ──


class Model:
    """A client with a session, which takes, loses and resumes as a test says, and what it should see.

    Attributes:
        seen: The numbered messages that the client has processed: key and value.
        due: The messages that it must get unless a newer one replaces them: key and value, in order of the calls.
    """

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.peer = Peer(stage)
        self.line: Line | None = None
        self.seen: list[tuple[str, int]] = []
        self.due: list[tuple[str, int]] = []
        self.sending: list[tuple[tuple[str, int], asyncio.Future[None]]] = []
        self._read = 0
        self._next = 0

    def value(self, key: str, size: int) -> tuple[tuple[str, int], list[Any]]:
        """Return a new value with its key, and the message with it."""
        self._next += 1
        return (key, self._next), [key, self._next, "x" * size]

    async def do(self, step: str, key: str, number: int) -> None:
        """Do one step."""
        line = self.line
        if step == "turn":
            await soon()
        elif step == "offer":
            entry, message = self.value(key, number)
            await self.stage.manager.send_to_client("ann", message, coalesce_key=key or None)
            self.due.append(entry)
        elif step == "volatile":
            await self.stage.manager.send_to_client("ann", "volatile", coalesce_key=key or None, volatile=True)
        elif step == "send" and line is not None and line.socket is not None:
            entry, message = self.value(key, number)
            send = line.socket.send(message, coalesce_key=key or None, ack=number % 2 == 1)
            self.sending.append((entry, asyncio.ensure_future(send)))
            await asyncio.sleep(0)
            self.due.append(entry)
        elif step == "cancel" and self.sending:
            entry, sender = self.sending[number % len(self.sending)]
            if sender.cancel():  # else it has returned or failed, which is checked at the end
                self.sending.remove((entry, sender))
                self.due.remove(entry)
        elif step == "block" and line is not None:
            line.server.block()
        elif step == "release" and line is not None:
            line.server.release()
        elif step == "ack" and line is not None:
            self.process(line, 1.0)
            await line.say({"type": "ack", "seq": len(self.seen)})
        elif step == "lose":
            await self.lose(number / 10)
        elif step == "resume":
            await self.lose(1.0)
            await self.resume()

    def check_buffer(self) -> None:
        """Check that the replay buffer holds what the client has seen, and that all numbers arrive."""
        buffer = self.session.buffer
        stored = [parse(frame.text or "")["data"][:2] for frame in buffer.entries]
        seen = [list(entry) for entry in self.seen[buffer.first_seq - 1 :]]
        assert stored[: len(seen)] == seen
        line = self.line
        if line is not None and self.session.connection is not None and not self._unsent(line):
            self.process(line, 1.0)
            assert len(self.seen) == buffer.head

    def _unsent(self, line: Line) -> bool:
        """Return whether the server has not taken all frames."""
        socket, server = line.socket, line.server
        return socket is None or socket.queued_messages > 0 or len(server.taken) < len(server.offered)

    def process(self, line: Line, share: float) -> None:
        """Let the client process a share of the frames that it has not read."""
        frames = [parse(data) for data in line.server.data[self._read :]]
        frames = frames[: round(share * len(frames))]
        self._read += len(frames)
        for frame in frames:
            if frame["type"] == "welcome":
                assert frame["resume"] in ("none", "full")
                assert frame["seq"] == len(self.seen)
            elif frame["type"] == "ping":
                assert frame["seq"] == len(self.seen)
            elif frame["type"] == "msg" and not frame.get("volatile"):
                key, number, _ = frame["data"]
                self.seen.append((key, number))

    async def lose(self, share: float) -> None:
        """Lose the connection, after the client has processed a share of what it was sent."""
        line, self.line = self.line, None
        if line is None:
            return
        self.process(line, share)
        await line.leaves()
        line.server.release()
        await soon()

    async def resume(self) -> None:
        """Connect, for the first time or again."""
        self._read = 0
        self.line = await self.peer.dial(seq=len(self.seen))
        session = self.stage.manager._node.sessions.get(self.line.welcome["session"])
        assert session is not None
        self.session = session

    async def finish(self) -> None:
        """Let the client read everything, over one more connection."""
        for _ in range(2):
            if self.line is not None:
                self.line.server.release()
                await soon()
                self.check_buffer()
            await self.lose(1.0)
            await self.resume()
            await soon()
            assert self.line is not None
            self.process(self.line, 1.0)
        await self.line.say({"type": "ack", "seq": len(self.seen)})
        for entry, sender in self.sending:
            outcome = (await with_deadline(asyncio.gather(sender, return_exceptions=True)))[0]
            if isinstance(outcome, SocketClosed):
                self.due.remove(entry)
            else:
                assert outcome is None

    def check(self) -> None:
        """Check what the client has seen."""
        assert len(set(self.seen)) == len(self.seen)
        for key in "abc":
            values = [value for one, value in self.seen if one == key]
            assert values == sorted(values)
            due = [value for one, value in self.due if one == key]
            assert not due or values[-1] >= due[-1]
        plain = [entry for entry in self.seen if not entry[0]]
        assert [entry for entry in plain if entry in self.due] == [entry for entry in self.due if not entry[0]]


KINDS = {"offer": 8, "send": 4, "volatile": 2, "turn": 2, "block": 3, "release": 1, "ack": 1, "lose": 2, "resume": 3}
STEPS = st.tuples(
    st.sampled_from([kind for kind, share in {**KINDS, "cancel": 2}.items() for _ in range(share)]),
    st.sampled_from(["", "a", "a", "b"]),
    st.integers(0, 10),
)


@settings(deadline=None, max_examples=300)
@given(st.lists(STEPS, max_size=40), st.sampled_from([2, 5, 100]))
@example([("send", "", 1), ("send", "", 0), ("offer", "", 0), ("send", "", 0), ("cancel", "", 0), ("cancel", "", 0)], 2)
def test_client_sees_consecutive_numbers_and_last_values(steps: list[tuple[str, str, int]], room: int) -> None:
    """With any interleaving, numbers are consecutive, and the last value of each key and all other messages arrive."""

    async def play() -> None:
        async with Stage(outbox_max_messages=room, inbox_max_messages=1000) as stage:
            model = Model(stage)
            await model.resume()
            for step in steps:
                await model.do(*step)
                model.check_buffer()
            await model.finish()
            model.check()

    run_virtually(play())
