"""channel-box: a group of Starlette sockets that gets a message one socket after the other."""

from channel_box import Channel, ChannelBox
from starlette.applications import Starlette
from starlette.endpoints import WebSocketEndpoint
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket

from benchmarks.apps.serving import serve_asgi


class Endpoint(WebSocketEndpoint):
    async def on_connect(self, websocket: WebSocket) -> None:
        await websocket.accept()
        channel = Channel(websocket=websocket, expires=3600, payload_type="text")
        await ChannelBox.add_channel_to_group(channel=channel, group_name="all")


app = Starlette(routes=[WebSocketRoute("/ws/{client_id}", Endpoint)])


async def broadcast(message: str) -> None:
    await ChannelBox.group_send(group_name="all", payload=message)


if __name__ == "__main__":
    serve_asgi(app, broadcast)
