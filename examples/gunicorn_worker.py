from fastapi import FastAPI
from uvicorn_worker import UvicornWorker

from fastapi_ws_stabilizer import StableSocketDep, WebSocketConnectionManager

manager = WebSocketConnectionManager()
app = FastAPI(lifespan=manager.lifespan)


class StableWorker(UvicornWorker):
    CONFIG_KWARGS = {**UvicornWorker.CONFIG_KWARGS, **manager.uvicorn_options()}


@app.websocket("/ws/{client_id}")
async def echo(ws: StableSocketDep) -> None:
    async for message in ws:
        await ws.send(message)
