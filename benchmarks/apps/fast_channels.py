"""fast-channels alone: a consumer in a group, with the in-memory layer."""

from typing import Any

from fast_channels.consumer.websocket import AsyncWebsocketConsumer
from fast_channels.layers import InMemoryChannelLayer, register_channel_layer
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute

from benchmarks.apps.serving import serve_asgi

layer = InMemoryChannelLayer()
register_channel_layer("default", layer)


class Consumer(AsyncWebsocketConsumer):
    channel_layer_alias = "default"
    groups = ["all"]  # noqa: RUF012 (fast-channels declares groups like this)

    async def news(self, event: dict[str, Any]) -> None:
        await self.send(text_data=event["text"])


app = Starlette(routes=[WebSocketRoute("/ws/{client_id}", Consumer.as_asgi())])


async def broadcast(message: str) -> None:
    await layer.group_send("all", {"type": "news", "text": message})


if __name__ == "__main__":
    serve_asgi(app, broadcast)
