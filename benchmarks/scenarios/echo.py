"""Echo: the path of a message through the server and the endpoint, in and out."""

from __future__ import annotations

from benchmarks.bench import Bench
from benchmarks.contenders import BARE, PLAIN, PROTOCOL
from benchmarks.figures import Table
from benchmarks.frames import frame_bytes
from benchmarks.processes import ContenderError, Stand

ECHO_BYTES = 100


def echo(bench: Bench) -> list[Table]:
    """Let each client send, wait for the reply, and send again."""
    clients = bench.scale.echo_clients
    rate = Table(
        "echo",
        f"Echo: {clients} clients, {ECHO_BYTES} bytes",
        "messages/s",
        "Each client sends, waits for the echo, and sends the next. More is better.",
        BARE.key,
        digits=0,
    )
    cpu = Table("echo-cpu", "Echo: server CPU", "µs", "Server CPU per echoed message, of the same runs.", BARE.key)

    def prepare(stand: Stand) -> None:
        stand.connect(clients)
        run(stand, 0.3)

    def run(stand: Stand, seconds: float) -> tuple[float, float, float]:
        stand.server.call("collect")
        before = stand.cpu()
        stand.load.begin("echo", seconds=seconds, size=ECHO_BYTES, reply_bytes=frame_bytes(ECHO_BYTES))
        answer = stand.loaded()
        used = stand.cpu() - before
        if answer["lost"]:
            raise ContenderError(f"lost {answer['lost']} clients")
        return answer["in_time"] / answer["seconds"], 1e6 * used / answer["replies"], stand.take_load_share()

    def measure(stand: Stand) -> None:
        per_second, microseconds, share = run(stand, bench.scale.echo_seconds)
        rate.add(stand.contender, per_second, share)
        cpu.add(stand.contender, microseconds, share)

    bench.alternate((BARE, PLAIN, PROTOCOL), [rate, cpu], prepare, measure)
    return [rate, cpu]
