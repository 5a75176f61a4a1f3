"""Cost of a connection: memory, heartbeats, connecting and disconnecting."""

from __future__ import annotations

import time

from benchmarks.bench import Bench
from benchmarks.contenders import BARE, PLAIN, PLAIN_V1, PROTOCOL, PROTOCOL_V1, REFERENCE
from benchmarks.figures import Table
from benchmarks.processes import ContenderError, Stand
from benchmarks.scenarios.storms import ADDRESSES, TIMEOUT

WARM_UP_CONNECTIONS = 200
SETTLE_SECONDS = 0.5
HEARTBEAT_INTERVAL = 1.0


def memory(bench: Bench) -> list[Table]:
    """Measure the memory that a server holds for an idle client."""
    clients = bench.scale.memory_clients
    table = Table(
        "memory",
        f"Memory: {clients:,} idle connections",
        "KiB",
        f"Growth of the server's proportional set per connection, after {WARM_UP_CONNECTIONS} that came and went; "
        "garbage collected and free memory given back. Buffers of the kernel are not in it.",
        BARE.key,
    )

    def measure(stand: Stand) -> None:
        stand.load.call("churn", count=WARM_UP_CONNECTIONS, port=stand.port, path=stand.contender.path)
        time.sleep(SETTLE_SECONDS)
        before = stand.server.call("memory")["bytes"]
        stand.connect(clients)
        time.sleep(SETTLE_SECONDS)
        after = stand.server.call("memory")["bytes"]
        table.add(stand.contender, (after - before) / clients / 1024)

    bench.afresh((BARE, PLAIN, PROTOCOL, PLAIN_V1, PROTOCOL_V1, REFERENCE), [table], measure)
    return [table]


def resumable(bench: Bench) -> list[Table]:
    """Measure the whole server process with many sessions, while their clients are connected and when they are away."""
    clients = bench.scale.storm_clients
    note = "Proportional set of the whole process, garbage collected and free memory given back."
    connected = Table("resumable", f"Memory: {clients:,} connected clients with a session", "MiB", note, PLAIN_V1.key)
    detached = Table(
        "resumable-away",
        f"Memory: the sessions of {clients:,} clients that are away",
        "MiB",
        "Of the same runs, after all clients have vanished. Each of them could resume its session.",
        PLAIN_V1.key,
    )

    def measure(stand: Stand) -> None:
        stand.connect(clients, addresses=ADDRESSES, timeout=TIMEOUT)
        time.sleep(SETTLE_SECONDS)
        connected.add(stand.contender, stand.server.call("memory")["bytes"] / 2**20)
        stand.load.call("vanish")
        stand.wait_until_idle()
        detached.add(stand.contender, stand.server.call("memory")["bytes"] / 2**20)

    bench.afresh((PLAIN_V1, PROTOCOL_V1), [connected, detached], measure)
    return [connected, detached]


def heartbeat(bench: Bench) -> list[Table]:
    """Measure the CPU that heartbeats cost."""
    clients, seconds = bench.scale.heartbeat_clients, bench.scale.heartbeat_seconds
    table = Table(
        "heartbeat",
        f"Heartbeat: {clients:,} idle clients, one ping a second",
        "µs",
        "Server CPU per ping and its answer, minus what the server uses without connections.",
        REFERENCE.key,
    )

    def measure(stand: Stand) -> None:
        begun, before = time.monotonic(), stand.cpu()
        time.sleep(0.7)
        idle = (stand.cpu() - before) / (time.monotonic() - begun)
        stand.connect(clients)
        stand.load.call("answer", seconds=1.5 * HEARTBEAT_INTERVAL)
        begun, before = time.monotonic(), stand.cpu()
        stand.load.begin("answer", seconds=seconds)
        answer = stand.loaded()
        used = stand.cpu() - before - idle * (time.monotonic() - begun)
        if answer["lost"] or not answer["pings"]:
            raise ContenderError(f"{answer['pings']} pings, {answer['lost']} clients lost")
        table.add(stand.contender, 1e6 * used / answer["pings"], stand.take_load_share())
        table.row(stand.contender).note(
            "rate", f"{answer['pings'] / clients / seconds:.2f} pings a second for each client"
        )

    contenders = [one.using(heartbeat_interval=HEARTBEAT_INTERVAL) for one in (PLAIN, PROTOCOL, REFERENCE)]
    bench.afresh(contenders, [table], measure)
    return [table]


def connect(bench: Bench) -> list[Table]:
    """Measure clients that connect and disconnect."""
    count = bench.scale.churn_connections
    rate = Table(
        "connect",
        f"Connect rate: {count:,} connections, 50 at a time",
        "connections/s",
        "Handshake, close frame, end of the connection. More is better.",
        BARE.key,
        digits=0,
    )
    cpu = Table(
        "connect-cpu", "Connect rate: server CPU", "µs", "Per connection, of the same runs.", BARE.key, digits=0
    )

    def run(stand: Stand, number: int) -> tuple[float, float, float]:
        stand.server.call("collect")
        before = stand.cpu()
        stand.load.begin("churn", count=number, port=stand.port, path=stand.contender.path)
        answer = stand.loaded()
        time.sleep(0.2)  # endpoints end after their connections
        return number / answer["seconds"], 1e6 * (stand.cpu() - before) / number, stand.take_load_share()

    def prepare(stand: Stand) -> None:
        run(stand, WARM_UP_CONNECTIONS)

    def measure(stand: Stand) -> None:
        per_second, microseconds, share = run(stand, count)
        rate.add(stand.contender, per_second, share)
        cpu.add(stand.contender, microseconds, share)

    bench.alternate((BARE, PLAIN, PROTOCOL, REFERENCE), [rate, cpu], prepare, measure)
    return [rate, cpu]
