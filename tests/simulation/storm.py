"""One run: a client and a server through 40 s of faults, a calm, and a final check of what each of them has."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastapi import HTTPException, WebSocketException
from starlette.websockets import WebSocket

from fastapi_ws_stabilizer import StableSocket, WebSocketConfig, WebSocketConnectionManager
from fastapi_ws_stabilizer.client import Client, ClientError, Gap, RequestError, RequestTimeoutError
from fastapi_ws_stabilizer.close_codes import CloseInfo, DisconnectReason
from fastapi_ws_stabilizer.sessions.session import Session
from fastapi_ws_stabilizer.wire.encoded import encode
from fastapi_ws_stabilizer.wire.v1.frames import control_frame
from tests.simulation.network import Network

STORM = 40.0
CALM = 60.0
PROBES = 20


@dataclass(frozen=True)
class Scenario:
    """Kind of storm.

    Attributes:
        restart: What a restart of the server loses: `None` for no restarts, the sessions, or the end of the replay
            buffer.
        log: Maximum messages in the replay buffer of a session.
        replay_on_lost: Whether the client sends messages of a lost session again.
    """

    name: str
    restart: str | None = None
    log: int = 60
    replay_on_lost: bool = False

    def __str__(self) -> str:
        return self.name


SCENARIOS = (
    Scenario("no restarts"),
    Scenario("restarts lose the sessions", restart="lose"),
    Scenario("restarts rewind the log", restart="rewind"),
    Scenario("a log of eight messages", log=8),
    Scenario("restarts, and lost messages are sent again", restart="lose", replay_on_lost=True),
)


@dataclass
class Published:
    """One message of the server to one session."""

    seq: int
    data: str
    at: float
    void: bool = False


@dataclass
class Outcome:
    """Result of a run.

    Attributes:
        violations: Promises that were broken.
        counts: Events by how often they happened.
    """

    violations: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


class Storm:
    """One run.

    Args:
        seed: Seed of all random decisions.
        scenario: Kind of storm.
        weaken: Called with a new manager, to remove a protection.
    """

    def __init__(self, seed: int, scenario: Scenario, weaken: Callable[[Any], None] | None = None) -> None:
        self.dice = random.Random(seed)
        self.scenario = scenario
        self.weaken = weaken
        self.outcome = Outcome()
        self.published: dict[str, list[Published]] = {}
        self.processed: list[tuple[str, str]] = []
        self.received: dict[str | None, list[str]] = {}
        self.gaps: list[tuple[str | None, Gap, float]] = []
        self.sent: dict[str, asyncio.Future[None]] = {}
        self.requests: dict[str, asyncio.Task[Any]] = {}
        self.numbers = iter(range(10**9))
        self.rewound: set[str] = set()
        self.old: list[asyncio.Task[Any]] = []
        self.network = Network(self.dice, self._serve)
        self.manager = self._make_manager()

    # ── the server ──

    def _make_manager(self) -> WebSocketConnectionManager:
        manager = WebSocketConnectionManager(
            WebSocketConfig(
                heartbeat_interval=2.5,
                heartbeat_timeout=2.0,
                session_ttl=35,
                hello_timeout=5,
                disconnect_grace=1,
                send_timeout=5,
                replay_max_messages=self.scenario.log,
                max_bad_messages=None,
            )
        )
        manager.events._listeners.clear()  # no logs

        @manager.on_message("c")
        async def take(ws: StableSocket, data: str) -> None:
            self.processed.append((ws.session_id or "", data))

        @manager.on_message("q")
        async def answer(ws: StableSocket, data: str) -> str:
            self.processed.append((ws.session_id or "", data))
            return f"re:{data}"

        if self.weaken is not None:
            self.weaken(manager)
        return manager

    async def _serve(self, websocket: WebSocket) -> None:
        try:
            async with self.manager.serve(websocket) as ws:
                await ws.run()
        except (WebSocketException, HTTPException):
            pass

    @property
    def sessions(self) -> list[Session]:
        return list(self.manager._node.sessions._by_id.values())

    def publish(self, session: Session, data: str) -> None:
        """Send a message to one session."""
        session.outbox.offer(encode(data))
        entry = Published(session.head, data, asyncio.get_running_loop().time())
        self.published.setdefault(session.connection_id, []).append(entry)

    def restart(self) -> None:
        """Restart the server, which forgets a part of its state."""
        if self.scenario.restart == "rewind":
            for connection in list(self.manager._node.connections):
                connection.on_peer_close(CloseInfo(DisconnectReason.NETWORK_LOST, 1006, by_peer=True))
            self._cut()
            for session in self.sessions:
                lost = self.dice.randrange(5)
                session.rewind(lost)
                self.rewound.add(session.connection_id)
                for entry in self.published.get(session.connection_id, []):
                    entry.void |= entry.seq > session.head
            return
        old, self.manager = self.manager, self._make_manager()
        if self.dice.random() < 0.5:
            self.old.append(asyncio.ensure_future(old.graceful_shutdown(0.5)))
        else:
            self._cut()
            self.old.append(asyncio.ensure_future(old.graceful_shutdown(0.1)))

    def _cut(self) -> None:
        for link in self.network.links:
            link.up.dead = True
            link.lose_client(1006)
            link.tell_server(1006)

    def drain(self) -> None:
        """Ask every client to reconnect soon."""
        for session in self.sessions:
            if session.connection is not None:
                session.connection.answer(control_frame("drain", after=self.dice.randrange(500), within=1000))  # type: ignore[attr-defined]

    # ── the client ──

    def send(self) -> None:
        """Send a message."""
        data = f"c{next(self.numbers)}"
        try:
            self.sent[data] = self.client.send(data, event="c")
        except ClientError:
            self.outcome.counts["refused at once"] += 1

    async def request(self, data: str, timeout: float) -> Any:
        """Send a request."""
        try:
            return await self.client.request("q", data, timeout=timeout)
        except (ClientError, RequestError, RequestTimeoutError) as error:
            return error

    async def read(self) -> None:
        """Record everything that the client receives."""
        async for message in self.client:
            self.received.setdefault(self.client.session, []).append(message.data)

    # ── the run ──

    async def run(self) -> Outcome:
        """Run the storm, the calm and the checks."""
        loop = asyncio.get_running_loop()
        self.client = Client(
            "ws://server/ws/ann",
            dial=self.network.dial,
            connect_timeout=1.5,
            base_delay=0.2,
            max_delay=2.0,
            stable_after=1.0,
            probe_timeout=0.6,
            replay_on_lost=self.scenario.replay_on_lost,
        )
        self.client.on_gap(lambda gap: self.gaps.append((self.client.session, gap, loop.time())))
        self.client.on_close(lambda code, _: self.outcome.counts.update([f"closed {code}"]))
        self.client.start()
        reader = asyncio.ensure_future(self.read())
        while loop.time() < STORM:
            self._something()
            await asyncio.sleep(self.dice.random() * 0.12)
        self.network.faulty = False
        await asyncio.sleep(CALM)
        await self._last_look()
        self._judge()
        await self.client.close()
        reader.cancel()
        await self.manager.graceful_shutdown(1.0)
        await asyncio.gather(reader, *self.old, *self.network.tasks, return_exceptions=True)
        return self.outcome

    def _something(self) -> None:
        roll = self.dice.random()
        if roll < 0.45:
            for session in self.sessions:
                self.publish(session, f"p{next(self.numbers)}")
        elif roll < 0.75:
            self.send()
        elif roll < 0.85:
            data = f"q{next(self.numbers)}"
            self.requests[data] = asyncio.ensure_future(self.request(data, 30))
        elif roll < 0.87:
            self.drain()
        elif roll < 0.88:
            if self.scenario.restart:
                self.restart()
        elif roll < 0.90:
            self.client.probe()
        elif roll < 0.91:
            self.client.reconnect()

    async def _last_look(self) -> None:
        """Check that everything arrives after the storm."""
        probes = [f"z{number}" for number in range(PROBES)]
        session = self.manager._node.sessions.get(self.client.session or "")
        for probe in probes:
            if session is not None:
                self.publish(session, probe)
            await asyncio.sleep(0.03)
        answers = [await self.request(f"y{number}", 5) for number in range(5)]
        await asyncio.sleep(2)
        got = [data for data in self.received.get(self.client.session, []) if data.startswith("z")]
        if got != probes:
            self._broken(f"probes not delivered once and in order: {got[:5]}... of {len(got)}")
        if answers != [f"re:y{number}" for number in range(5)]:
            self._broken(f"the last requests: {answers}")
        if self.client.state != "open":
            self._broken(f"not connected at the end: {self.client.state}")

    # ── the checks ──

    def _broken(self, what: str) -> None:
        self.outcome.violations.append(what)

    def _judge(self) -> None:
        self._judge_downward()
        self._judge_upward()
        self.outcome.counts["delivered"] = sum(map(len, self.received.values()))
        self.outcome.counts["gaps"] = len(self.gaps)

    def _judge_downward(self) -> None:
        """Check messages of the server: once and in order in each session, a gap for all others of the last one."""
        for session, got in self.received.items():
            numbers = [int(data[1:]) for data in got if data.startswith("p")]
            if sorted(set(numbers)) != numbers:
                self._broken(f"doubled or out of order in {session}")
        final = self.client.session
        times = Counter(self.received.get(final, []))
        if self.scenario.restart is None and any(gap.session_lost for _, gap, _ in self.gaps):
            self._broken("a session was lost that the server has never forgotten")
        for entry in self.published.get(final or "", []):
            if times[entry.data] == 1 or (entry.void and times[entry.data] <= 1):
                continue
            if times[entry.data] > 1:
                self._broken(f"delivered twice: {entry.data}")
            elif not any(self._covers(gap, entry, at) for session, gap, at in self.gaps if session == final):
                self._broken(f"lost in silence: {entry.data}, number {entry.seq}")

    @staticmethod
    def _covers(gap: Gap, entry: Published, at: float) -> bool:
        if gap.session_lost or at < entry.at:
            return False
        return gap.why in ("ahead", "epoch") or gap.first <= entry.seq <= (gap.last or 0)

    def _judge_upward(self) -> None:
        """Check messages of the client: handled once and in order, and every promise settled."""
        times = Counter(data for _, data in self.processed)
        for data, done in self.sent.items():
            if not done.done():
                self._broken(f"never settled: {data}")
            elif done.exception() is None and not times[data]:
                self._broken(f"accepted and not handled: {data}")
            elif times[data] > 1 and not self.scenario.replay_on_lost:
                self._broken(f"handled twice: {data}")
            self.outcome.counts["accepted" if done.done() and done.exception() is None else "failed"] += 1
        for data, task in self.requests.items():
            if not task.done():
                self._broken(f"never settled: {data}")
            elif isinstance(task.result(), str) and (task.result() != f"re:{data}" or not times[data]):
                self._broken(f"answered wrongly: {data}")
            elif times[data] > 1 and not self.scenario.replay_on_lost:
                self._broken(f"handled twice: {data}")
        last: dict[str, int] = {}
        for session, data in self.processed:
            number = int(data[1:]) if data[0] in "cq" else 10**9
            if number < last.get(session, -1) and not self.scenario.replay_on_lost:
                self._broken(f"handled out of order in {session}: {data}")
            last[session] = number
