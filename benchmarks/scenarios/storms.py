"""Many clients that connect within seconds, and that vanish at once."""

from __future__ import annotations

import time

from benchmarks.bench import Bench
from benchmarks.contenders import BARE_DEPENDENCY, PLAIN, PROTOCOL
from benchmarks.figures import Table
from benchmarks.processes import ContenderError, Stand

ADDRESSES = 8
WARM_UP_CONNECTIONS = 200
GARBAGE_CONNECTIONS = 1000
TIMEOUT = 60.0
SETTLE_SECONDS = 4.0
"""Seconds on an idle server in which a paced collector runs what it has put off."""

PACED_BARE = BARE_DEPENDENCY.using("same gc_pacing", gc_pacing=True)


def storm(bench: Bench) -> list[Table]:
    """Measure a storm of connects, and the disconnect of all these clients at once."""
    clients = bench.scale.storm_clients
    baseline = BARE_DEPENDENCY.key
    connecting = Table(
        "storm-connecting",
        f"Storm: longest stall of the event loop while {clients:,} clients connect",
        "ms",
        "A timer that is due each millisecond: the most that it came late until the server is idle. 50 handshakes at "
        "a time.",
        baseline,
    )
    vanishing = Table(
        "storm-vanishing",
        f"Storm: longest stall of the event loop when all {clients:,} vanish at once",
        "ms",
        "Of the same runs. The clients close their sockets without a closing handshake.",
        baseline,
    )
    cpu = Table(
        "storm-cpu",
        "Storm: server CPU of a connect",
        "µs",
        "Of the same runs, with the garbage collections, also those on the idle server afterwards.",
        baseline,
        digits=0,
    )
    garbage = Table(
        "storm-garbage",
        "Storm: objects left to the garbage collector",
        "objects",
        f"Per ended connection, of {GARBAGE_CONNECTIONS:,} that vanished while automatic collections were off. "
        "Some are the server's own.",
        baseline,
    )

    def measure(stand: Stand) -> None:
        contender = stand.contender
        stand.load.call("churn", count=WARM_UP_CONNECTIONS, port=stand.port, path=contender.path)
        stand.wait_until_idle()
        garbage.add(contender, count_garbage(stand) / GARBAGE_CONNECTIONS)
        stand.server.call("watch", on=True)
        before = stand.cpu()
        stand.load.begin("connect", count=clients, port=stand.port, **how(stand))
        answer = stand.loaded()
        if answer["connected"] != clients:
            raise ContenderError(f"{answer['connected']} of {clients} clients are connected")
        share = stand.take_load_share()
        add_stall(stand, connecting, share)
        cpu.add(contender, 1e6 * (stand.cpu() - before) / clients, share)
        stand.load.call("vanish")
        add_stall(stand, vanishing)

    tables = [connecting, vanishing, cpu, garbage]
    bench.afresh((BARE_DEPENDENCY, PACED_BARE, PLAIN, PROTOCOL), tables, measure)
    return tables


def how(stand: Stand) -> dict[str, object]:
    """Return how the clients of a storm connect."""
    return {"path": stand.contender.path, "addresses": ADDRESSES, "timeout": TIMEOUT}


def add_stall(stand: Stand, table: Table, share: float = 0.0) -> None:
    """Add the longest stall until the server is idle, with a note about garbage collections until then and later."""
    stand.wait_until_idle()
    held = stand.server.call("stall")
    time.sleep(SETTLE_SECONDS)
    later = stand.server.call("stall")
    table.add(stand.contender, 1e3 * held["longest"], share)
    note = f"longest garbage collection {1e3 * held['collection']:.1f} ms"
    if later["collection"] > 0.001:
        note += f", and {1e3 * later['collection']:.1f} ms later on the idle server"
    table.row(stand.contender).note("collection", f"last run: {note}")


def count_garbage(stand: Stand) -> int:
    """Return the number of objects that `GARBAGE_CONNECTIONS` leave to the garbage collector when they vanish."""
    stand.server.call("collect", automatic=False)
    stand.load.call("connect", count=GARBAGE_CONNECTIONS, port=stand.port, **how(stand))
    stand.load.call("vanish")
    stand.wait_until_idle()
    return int(stand.server.call("collect")["found"])
