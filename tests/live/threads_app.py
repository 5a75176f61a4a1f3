"""App with threads that broadcast to its clients."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable

from fastapi import FastAPI

from fastapi_ws_stabilizer import StableSocketDep, WebSocketConnectionManager

MESSAGES = 200
"""Messages of each thread."""

manager = WebSocketConnectionManager()
app = FastAPI(lifespan=manager.lifespan)


@app.websocket("/ws/{client_id}")
async def endpoint(ws: StableSocketDep) -> None:
    await ws.run()


def publish_from_thread(text: str) -> str:
    return f"queued for {manager.from_thread.broadcast(text).succeeded}"


def publish_on_own_loop(text: str) -> str:
    try:
        return f"queued for {asyncio.run(manager.broadcast(text)).succeeded}"
    except RuntimeError as error:
        return type(error).__name__


@app.post("/publish")
def publish(path: str) -> dict[str, int]:
    """Publish from three threads at the same time, and count the results."""
    results: Counter[str] = Counter()
    call: Callable[[str], str] = publish_from_thread if path == "from_thread" else publish_on_own_loop

    def run(name: int) -> None:
        for number in range(MESSAGES):
            results[call(f"{name}:{number}:" + "x" * 200)] += 1

    threads = [threading.Thread(target=run, args=(name,)) for name in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return dict(results)
