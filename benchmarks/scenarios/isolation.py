"""Effect of some clients on the others: those that stop reading, and very many."""

from __future__ import annotations

import time

from benchmarks.bench import Bench
from benchmarks.contenders import PLAIN, PROTOCOL, REFERENCE, Contender
from benchmarks.figures import Table
from benchmarks.processes import Stand
from benchmarks.scenarios.broadcasts import Course, lockstep, reach_all

SLOW_CLIENTS = 10
SLOW_BYTES = 4096
SLOW_OUTBOX = 64
REVIVE_SECONDS = 5.0
TRANSPORT_BYTES = 64 * 1024
"""Bytes that an asyncio transport buffers before it asks the server to pause."""

SLOW_LIMIT_BYTES = SLOW_CLIENTS * ((SLOW_OUTBOX + 1) * SLOW_BYTES + TRANSPORT_BYTES)
"""Maximum bytes that the limits allow the server to hold for the slow clients."""


def slow(bench: Bench) -> list[Table]:
    """Measure ten clients that stop reading while messages continue at a steady pace."""
    clients, before, after = bench.scale.fanout_clients, bench.scale.slow_messages_before, bench.scale.slow_messages
    others = clients - SLOW_CLIENTS
    delay = Table(
        "slow-delay",
        f"Slow clients: {SLOW_CLIENTS} of {clients:,} stop reading",
        "ms",
        f"99th percentile of the delay of {SLOW_BYTES:,}-byte messages to the {others:,} clients that read, "
        f"{before} messages before and {after} after the others have stopped. Their outboxes hold {SLOW_OUTBOX} "
        "messages, and overflow during the run.",
        "",
    )
    ratio = Table("slow-ratio", "Slow clients: delay with / without", "ratio", "99th percentiles, of the same run.", "")
    missed = Table(
        "slow-missed",
        "Slow clients: reading clients that missed messages",
        "clients",
        f"Of {others:,}.",
        "",
        digits=0,
    )
    call = Table("slow-call", "Slow clients: longest call of `broadcast()`", "ms", "Of the same runs.", "")
    memory = Table(
        "slow-memory",
        "Slow clients: growth of the server's memory",
        "KiB",
        "Highest resident set while they did not read, above that when they stopped. "
        f"The limits allow {SLOW_LIMIT_BYTES / 1024:,.0f}.",
        "",
        digits=0,
    )
    tables = [delay, ratio, missed, call, memory]

    def measure(stand: Stand) -> None:
        contender = stand.contender
        stand.connect(others)
        stand.connect(SLOW_CLIENTS, slow=SLOW_CLIENTS)
        stand.server.call("prepare", kind="text", count=1, size=SLOW_BYTES)
        course = Course(0.0, reach_all(stand), 0)
        begun = time.monotonic()
        lockstep(stand, course, 5, clients)
        interval = min(0.2, max(0.02, 2.5 * (time.monotonic() - begun) / 5))
        stand.take_load_share()
        results = []
        for stalled, count in ((False, before), (True, after)):
            stand.load.call("mark")
            if stalled:
                # Connections that have been read from for a while have large buffers in the kernel. New ones have small
                # buffers.
                stand.load.call("drop")
                stand.connect(SLOW_CLIENTS, slow=SLOW_CLIENTS)
                stand.load.call("stall")
            stand.load.begin("stamps", each=count, timeout=count * interval + 10)
            stand.server.begin("pace", count=count, size=SLOW_BYTES, interval=interval)
            paced = stand.server.finish(count * interval + 30)
            results.append((paced, stand.loaded(), stand.take_load_share()))
        closed = stand.load.call("revive", seconds=REVIVE_SECONDS)["closed"]
        (free_pace, free, share), (held_pace, held, held_share) = results
        reading, stalling = contender.using("all read"), contender.using(f"{SLOW_CLIENTS} stopped")
        delay.add(reading, 1e3 * free["p99"], share)
        delay.add(stalling, 1e3 * held["p99"], held_share)
        delay.row(stalling).note("pace", f"one message each {1e3 * interval:.0f} ms in the last run")
        ratio.add(contender, held["p99"] / free["p99"])
        missed.add(contender, others - held["complete"])
        missed.row(contender).note("closed", f"{closed} of the slow ones were closed in the last run")
        call.add(reading, 1e3 * free_pace["longest"])
        call.add(stalling, 1e3 * held_pace["longest"])
        for variant, pace in ((reading, free_pace), (stalling, held_pace)):
            took = 1e3 * pace["collection"]
            call.row(variant).note("collection", f"longest garbage collection of the last run {took:.1f} ms")
        memory.add(contender, held_pace["growth"] / 1024)

    bounded = [contender.using(outbox_max_messages=SLOW_OUTBOX) for contender in (PLAIN, PROTOCOL)]
    bench.afresh(bounded, tables, measure)
    return tables


def stall(bench: Bench) -> list[Table]:
    """Measure how long a broadcast to very many clients blocks the event loop."""
    clients, count = bench.scale.stall_clients, bench.scale.stall_broadcasts
    table = Table(
        "stall",
        f"Longest stall of the event loop: {count} broadcasts to {clients:,} clients",
        "ms",
        "A timer that is due each millisecond: the most that it came late in a run.",
        REFERENCE.key,
    )
    courses: dict[str, Course] = {}

    def prepare(stand: Stand) -> None:
        stand.connect(clients)
        stand.server.call("prepare", kind="text", count=count, size=100)
        courses[stand.contender.key] = Course(0.0, reach_all(stand), 0)
        lockstep(stand, courses[stand.contender.key], 2, clients)
        stand.take_load_share()

    def measure(stand: Stand) -> None:
        course = courses[stand.contender.key]
        stand.server.call("watch", on=True)
        time.sleep(0.3)
        idle = stand.server.call("stall")["longest"]
        longest, collection = [], 0.0
        for _ in range(count):
            lockstep(stand, course, 1, clients)
            held = stand.server.call("stall")
            longest.append(held["longest"])
            collection = max(collection, held["collection"])
        stand.server.call("watch", on=False)
        table.add(stand.contender, 1e3 * max(longest), stand.take_load_share())
        typical = sorted(longest)[count // 2]
        table.row(stand.contender).note(
            "typical",
            f"last run: median of the broadcasts {1e3 * typical:.1f} ms, longest garbage collection "
            f"{1e3 * collection:.1f} ms, before them {1e3 * idle:.1f} ms",
        )

    bench.alternate(
        (*sharded(PLAIN), *sharded(PROTOCOL), REFERENCE),
        [table],
        prepare,
        measure,
    )
    return [table]


def sharded(contender: Contender) -> tuple[Contender, Contender]:
    """Return the contender with its default of 16 shards, and with one shard."""
    return contender.using("16 shards", num_shards=16), contender.using("1 shard", num_shards=1)
