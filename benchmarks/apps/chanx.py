"""chanx on fast-channels with the in-memory layer: a typed event that is passed on to a group."""

from typing import Literal

import structlog
from chanx.core.decorators import channel
from chanx.fast_channels.websocket import AsyncJsonWebsocketConsumer
from chanx.messages.base import BaseMessage
from fast_channels.layers import InMemoryChannelLayer, register_channel_layer
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute

from benchmarks.apps.serving import serve_asgi

structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))


class News(BaseMessage):
    action: Literal["news"] = "news"
    payload: str


@channel(name="news")
class Consumer(AsyncJsonWebsocketConsumer):
    channel_layer_alias = "default"
    groups = ["all"]  # noqa: RUF012 (chanx declares groups like this)
    passthrough_events = [News]  # noqa: RUF012


register_channel_layer("default", InMemoryChannelLayer())
app = Starlette(routes=[WebSocketRoute("/ws/{client_id}", Consumer.as_asgi())])


async def broadcast(message: str) -> None:
    await Consumer.broadcast_event(News(payload=message))


if __name__ == "__main__":
    serve_asgi(app, broadcast)
