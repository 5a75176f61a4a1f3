"""One message to many clients: one at a time, in bursts, and compressed."""

from __future__ import annotations

import time
from dataclasses import dataclass

from benchmarks.bench import Bench
from benchmarks.contenders import (
    CHANNEL_BOX,
    CHANX,
    FAST_CHANNELS,
    LITESTAR,
    PICOWS,
    PLAIN,
    PLAIN_V1,
    PROTOCOL,
    PROTOCOL_V1,
    RAW,
    REFERENCE,
    SOCKETIO,
    WEBSOCKETS,
)
from benchmarks.figures import Table
from benchmarks.messages import quotes
from benchmarks.processes import ContenderError, Stand

FANOUT_BYTES = 100
ACK_EVERY = 32
ACKNOWLEDGING = "acknowledgements included"
BURST_MESSAGES = 50
BURSTS = 2
PREPARED = 50
MOST_BROADCASTS = 150
COMPRESSED = 0.8
"""Ratio of wire size to message size below which a message is called compressed."""


@dataclass
class Course:
    """Facts about a contender that are determined before it is measured.

    Attributes:
        command_cost: CPU seconds of a command that does nothing.
        wire_bytes: Bytes of one message on the wire; 0 where frames are counted instead.
        count: Number of broadcasts in a run.
        acknowledged: Whether clients acknowledge what they receive, after each `ACK_EVERY`.
        sent: Number of broadcasts that they have received.
    """

    command_cost: float
    wire_bytes: int
    count: int
    acknowledged: bool = False
    sent: int = 0


def reach_all(stand: Stand, attempts: int = 5) -> int:
    """Broadcast until a message has reached all clients; return its bytes on the wire.

    A server may count a client as connected a little later than the client does.

    Raises:
        ContenderError: The messages do not reach all clients.
    """
    for _ in range(attempts):
        stand.load.call("mark")
        stand.server.call("broadcast", number=0)
        counts = stand.load.call("quiet")
        if counts["least"] == counts["most"] > 0:
            return int(counts["least"])
        time.sleep(0.2)
    raise ContenderError(f"a broadcast does not reach all clients: {counts}")


def lockstep(stand: Stand, course: Course, count: int, clients: int) -> float:
    """Broadcast `count` times, each after all clients have the previous one; return the server's CPU seconds."""
    stand.load.call("mark")
    before = stand.cpu()
    for number in range(count):
        if course.wire_bytes:
            stand.load.begin("bytes", total=(number + 1) * clients * course.wire_bytes)
        else:
            stand.load.begin("frames", total=(number + 1) * clients)
        stand.server.begin("broadcast", number=number)
        stand.server.finish()
        answer = stand.loaded()
        course.sent += 1
        if course.acknowledged and course.sent % ACK_EVERY == 0:
            stand.load.call("say", text=f'{{"type":"ack","seq":{course.sent}}}')
    used = stand.cpu() - before - (count + 1) * course.command_cost
    if answer["lost"]:
        raise ContenderError(f"lost {answer['lost']} clients")
    return used


def broadcasts_for(stand: Stand, course: Course, clients: int, seconds: float, most: int = MOST_BROADCASTS) -> int:
    """Return how many broadcasts take about that long."""
    begun = time.monotonic()
    lockstep(stand, course, 3, clients)
    each = (time.monotonic() - begun) / 3
    return max(5, min(most, round(seconds / each)))


def fanout(bench: Bench) -> list[Table]:
    """Measure a small message to many clients."""
    clients = bench.scale.fanout_clients
    table = Table(
        "fanout",
        f"Fan-out: {FANOUT_BYTES} bytes to {clients:,} clients",
        "µs",
        "Server CPU per delivered message. Each broadcast begins when all clients have the one before.",
        REFERENCE.key,
    )
    courses: dict[str, Course] = {}

    def prepare(stand: Stand) -> None:
        stand.connect(clients)
        stand.server.call("prepare", kind="text", count=PREPARED, size=FANOUT_BYTES)
        course = Course(stand.command_cost(), reach_all(stand), 0)
        course.count = broadcasts_for(stand, course, clients, bench.scale.fanout_seconds)
        courses[stand.contender.key] = course
        stand.take_load_share()
        table.row(stand.contender).note("wire", f"{course.wire_bytes} bytes on the wire")

    def measure(stand: Stand) -> None:
        course = courses[stand.contender.key]
        stand.server.call("collect")
        used = lockstep(stand, course, course.count, clients)
        table.add(stand.contender, 1e6 * used / course.count / clients, stand.take_load_share())

    bench.alternate(
        (
            PLAIN,
            PROTOCOL,
            REFERENCE,
            SOCKETIO,
            LITESTAR,
            CHANX,
            FAST_CHANNELS,
            CHANNEL_BOX,
            WEBSOCKETS,
            PICOWS,
            RAW,
        ),
        [table],
        prepare,
        measure,
    )
    return [table]


def sessions(bench: Bench) -> list[Table]:
    """Measure the same message to clients with and without sessions."""
    clients = bench.scale.fanout_clients
    table = Table(
        "sessions",
        f"Fan-out to clients with sessions: {FANOUT_BYTES} bytes to {clients:,} clients",
        "µs",
        "Server CPU per delivered message, as above. Clients of stabilizer.v1.json get each message numbered, logged "
        f"and in an envelope. They acknowledge after each {ACK_EVERY}: what that costs is in rows of its own.",
        PLAIN.key,
    )
    courses: dict[str, Course] = {}

    def prepare(stand: Stand) -> None:
        stand.connect(clients)
        stand.server.call("prepare", kind="text", count=PREPARED, size=FANOUT_BYTES)
        acknowledged = stand.contender.variant == ACKNOWLEDGING
        course = Course(stand.command_cost(), reach_all(stand), 0, acknowledged, sent=1)
        course.count = broadcasts_for(stand, course, clients, bench.scale.fanout_seconds)
        courses[stand.contender.key] = course
        stand.take_load_share()
        table.row(stand.contender).note("wire", f"{course.wire_bytes} bytes on the wire")

    def measure(stand: Stand) -> None:
        course = courses[stand.contender.key]
        stand.server.call("collect")
        used = lockstep(stand, course, course.count, clients)
        table.add(stand.contender, 1e6 * used / course.count / clients, stand.take_load_share())

    with_acks = (PLAIN_V1.using(ACKNOWLEDGING), PROTOCOL_V1.using(ACKNOWLEDGING))
    contenders = (PLAIN, PLAIN_V1, with_acks[0], PROTOCOL, PROTOCOL_V1, with_acks[1])
    bench.alternate(contenders, [table], prepare, measure)
    return [table]


def burst(bench: Bench) -> list[Table]:
    """Measure many messages at once to many clients."""
    clients = bench.scale.fanout_clients
    table = Table(
        "burst",
        f"Burst: {BURST_MESSAGES} messages of {FANOUT_BYTES} bytes at once to {clients:,} clients",
        "µs",
        "Server CPU per delivered message; 50 broadcasts one after the other without a pause. "
        "The limit writes each client all 50 frames in one piece.",
        REFERENCE.key,
    )
    courses: dict[str, Course] = {}

    def prepare(stand: Stand) -> None:
        stand.connect(clients)
        stand.server.call("prepare", kind="text", count=BURST_MESSAGES, size=FANOUT_BYTES)
        courses[stand.contender.key] = Course(stand.command_cost(), reach_all(stand), BURSTS)
        send(stand, 1)
        stand.take_load_share()

    def send(stand: Stand, count: int) -> float:
        course = courses[stand.contender.key]
        stand.load.call("mark")
        before = stand.cpu()
        for number in range(count):
            stand.load.begin("bytes", total=(number + 1) * clients * BURST_MESSAGES * course.wire_bytes)
            stand.server.begin("burst")
            stand.server.finish()
            stand.loaded()
        return stand.cpu() - before - (count + 1) * course.command_cost

    def measure(stand: Stand) -> None:
        stand.server.call("collect")
        used = send(stand, BURSTS)
        table.add(stand.contender, 1e6 * used / BURSTS / BURST_MESSAGES / clients, stand.take_load_share())

    bench.alternate((PLAIN, PROTOCOL, REFERENCE, WEBSOCKETS, RAW), [table], prepare, measure)
    return [table]


def compressed(bench: Bench) -> list[Table]:
    """Measure JSON to clients that offer permessage-deflate, as browsers do."""
    return [_compressed(bench, "compressed-1k", 1024), _compressed(bench, "compressed-16k", 16 * 1024)]


def _compressed(bench: Bench, key: str, size: int) -> Table:
    clients = bench.scale.compressed_clients
    table = Table(
        key,
        f"Compressed fan-out: {size // 1024} KiB of JSON to {clients:,} clients",
        "µs",
        "Server CPU per delivered message; every client has offered permessage-deflate, and every message is another "
        "list of quotes. Under the reference it is uvicorn that compresses, once for each client.",
        REFERENCE.key,
    )
    courses: dict[str, Course] = {}

    def prepare(stand: Stand) -> None:
        agreed = stand.connect(clients, deflate=True)["deflate"]
        stand.server.call("prepare", kind="quotes", count=PREPARED, size=size)
        cost = stand.command_cost()
        reach_all(stand)
        course = Course(cost, 0, 0)
        course.count = broadcasts_for(stand, course, clients, bench.scale.fanout_seconds, most=30)
        courses[stand.contender.key] = course
        stand.take_load_share()
        if agreed < clients:
            table.row(stand.contender).note("deflate", f"only {agreed} clients got compression")

    def measure(stand: Stand) -> None:
        course = courses[stand.contender.key]
        stand.server.call("collect")
        used = lockstep(stand, course, course.count, clients)
        share = stand.take_load_share()
        wire = stand.load.call("quiet", quiet=0.01)["bytes"] / course.count / clients
        plain = sum(len(quotes(number, size)) for number in range(course.count)) / course.count
        if wire > COMPRESSED * plain:
            raise ContenderError(f"does not compress: {wire:,.0f} bytes on the wire for {plain:,.0f}")
        table.add(stand.contender, 1e6 * used / course.count / clients, share)
        table.row(stand.contender).note("wire", f"{wire:,.0f} of {plain:,.0f} bytes on the wire")

    bench.alternate((PLAIN, PROTOCOL, REFERENCE), [table], prepare, measure)
    return table
