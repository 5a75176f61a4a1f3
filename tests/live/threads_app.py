"""An app whose threads speak to its clients."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable

from fastapi import FastAPI

from fastapi_ws_stabilizer import StableSocketDep, WebSocketConnectionManager

MESSAGES = 200
"""Of each thread."""

manager = WebSocketConnectionManager()
app = FastAPI(lifespan=manager.lifespan)


@app.websocket("/ws/{client_id}")
async def endpoint(ws: StableSocketDep) -> None:
    await ws.run()


def right(text: str) -> str:
    return f"queued for {manager.from_thread.broadcast(text).succeeded}"


def wrong(text: str) -> str:
    try:
        return f"queued for {asyncio.run(manager.broadcast(text)).succeeded}"
    except RuntimeError as error:
        return type(error).__name__


@app.post("/publish")
def publish(how: str) -> dict[str, int]:
    """Let three threads publish at the same time, and tell what they were told."""
    told: Counter[str] = Counter()
    call: Callable[[str], str] = right if how == "right" else wrong

    def run(name: int) -> None:
        for number in range(MESSAGES):
            told[call(f"{name}:{number}:" + "x" * 200)] += 1

    threads = [threading.Thread(target=run, args=(name,)) for name in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return dict(told)
