"""A TCP proxy that cuts, stalls and swallows connections."""

from __future__ import annotations

import asyncio
from types import TracebackType


class Stream:
    """One connection through the proxy.

    Attributes:
        stalled: Whether it carries nothing for the moment.
        swallowed: Whether it reads everything and carries nothing, permanently.
    """

    def __init__(self, near: asyncio.StreamWriter, far: asyncio.StreamWriter) -> None:
        self.near = near
        self.far = far
        self._flows = asyncio.Event()
        self._flows.set()
        self.swallowed = False

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one direction until it ends."""
        try:
            while data := await reader.read(65536):
                await self._flows.wait()
                if not self.swallowed:
                    writer.write(data)
                    await writer.drain()
            if not self.swallowed:
                writer.close()
        except OSError:
            self.cut()

    def cut(self) -> None:
        """Reset both ends."""
        self.near.transport.abort()
        self.far.transport.abort()

    def cut_near(self) -> None:
        """Reset the client's end; the server does not notice."""
        self.swallowed = True
        self.near.transport.abort()

    def cut_far(self) -> None:
        """Reset the server's end; the client does not notice."""
        self.swallowed = True
        self.far.transport.abort()

    def swallow(self) -> None:
        """Read everything and carry nothing from now on; neither end notices."""
        self.swallowed = True

    async def stall(self, seconds: float) -> None:
        """Carry nothing for a while."""
        self._flows.clear()
        await asyncio.sleep(seconds)
        self._flows.set()


class CuttingProxy:
    """Proxy that listens on its own port and carries to another.

    Attributes:
        port: The port on which it listens.
        streams: The connections through it, the newest last.
        rejects: Whether new connections are reset.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0
        self.streams: list[Stream] = []
        self.rejects = False

    async def __aenter__(self) -> CuttingProxy:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for stream in self.streams:
            stream.cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.rejects:
            writer.transport.abort()
            return
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        stream = Stream(writer, far_writer)
        self.streams.append(stream)
        directions = ((reader, far_writer), (far_reader, writer))
        tasks = [asyncio.ensure_future(stream.carry(*direction)) for direction in directions]
        self._tasks.update(tasks)
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks.difference_update(tasks)
        self.streams.remove(stream)
        stream.cut()
