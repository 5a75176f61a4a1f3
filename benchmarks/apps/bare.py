"""A FastAPI WebSocket endpoint without any library. It has no broadcast."""

from fastapi import FastAPI, WebSocket, WebSocketDisconnect

from benchmarks.apps.serving import serve_asgi

app = FastAPI()


@app.websocket("/ws/{client_id}")
async def endpoint(ws: WebSocket) -> None:
    await ws.accept()
    try:
        while True:
            await ws.send_text(await ws.receive_text())
    except WebSocketDisconnect:
        pass


async def broadcast(message: str) -> None:
    raise NotImplementedError(message)


if __name__ == "__main__":
    serve_asgi(app, broadcast)
