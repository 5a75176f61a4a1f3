"""Litestar's channels plugin with its own route handlers and the in-memory backend."""

from litestar import Litestar
from litestar.channels import ChannelsPlugin
from litestar.channels.backends.memory import MemoryChannelsBackend

from benchmarks.apps.serving import serve_asgi

channels = ChannelsPlugin(MemoryChannelsBackend(), channels=["all"], create_ws_route_handlers=True)
app = Litestar(plugins=[channels])


async def broadcast(message: str) -> None:
    channels.publish(message, "all")


if __name__ == "__main__":
    serve_asgi(app, broadcast)
