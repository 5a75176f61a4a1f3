"""Connections behind a real nginx, which cuts idle ones. CI installs nginx; elsewhere the tests skip without it."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from fastapi_ws_stabilizer import WebSocketConfig
from fastapi_ws_stabilizer.platforms import hop
from tests.support.server import LiveServer, free_port, until

Serve = Callable[..., LiveServer]

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
CUT_AFTER = 2
"""Seconds of upstream silence after which nginx closes."""

CONF = """
daemon off;
worker_processes 1;
error_log stderr;
pid {folder}/nginx.pid;
events {{ worker_connections 64; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://127.0.0.1:{upstream};
            proxy_http_version 1.1;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection "upgrade";
            proxy_set_header Host $host;
            proxy_read_timeout {cut_after}s;
        }}
    }}
}}
"""

pytestmark = pytest.mark.skipif(NGINX is None and not os.environ.get("CI"), reason="nginx is not installed")


@contextmanager
def nginx(upstream: int, folder: Path) -> Iterator[int]:
    """Start nginx in front of a server, and yield its port."""
    assert NGINX is not None, "nginx is not installed"
    port = free_port()
    conf = folder / "nginx.conf"
    conf.write_text(CONF.format(folder=folder, port=port, upstream=upstream, cut_after=CUT_AFTER))
    process = subprocess.Popen([NGINX, "-p", str(folder), "-e", "stderr", "-c", str(conf)])
    try:
        yield port
    finally:
        process.terminate()
        process.wait(10)


async def until_up(port: int) -> None:
    """Wait until nginx answers."""

    async def answers() -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            return False
        writer.close()
        return True

    deadline = time.monotonic() + 10
    while not await answers():
        assert time.monotonic() < deadline, "nginx is not up"
        await asyncio.sleep(0.02)


async def test_nginx_cuts_idle_socket_without_heartbeat(serve: Serve, tmp_path: Path) -> None:
    """Without heartbeats the client sees 1006 after proxy_read_timeout, so the test below can fail."""
    server = serve(args=("--ws-ping-interval", "0"), config={"heartbeat_type": "off"})
    with nginx(server.port, tmp_path) as port:
        await until_up(port)
        async with connect(f"ws://127.0.0.1:{port}/idle/ann", ping_interval=None) as client:
            since = time.monotonic()
            with pytest.raises(ConnectionClosed):
                await asyncio.wait_for(client.recv(), CUT_AFTER + 5)
            assert time.monotonic() - since > CUT_AFTER - 0.5
            assert client.close_code == 1006
        await until(lambda: server.probe()["clients"] == [])


@pytest.mark.soak
async def test_for_platform_heartbeat_holds_nginx_connection_open(serve: Serve, tmp_path: Path) -> None:
    """The heartbeat interval of `for_platform` for this proxy holds an idle socket open for 15 s."""
    preset = WebSocketConfig.for_platform(hop("nginx", idle_timeout=CUT_AFTER))
    config = preset.model_dump(exclude_unset=True)
    assert set(config) == {"heartbeat_interval"}
    server = serve(args=("--ws-ping-interval", "0"), config=config)
    with nginx(server.port, tmp_path) as port:
        await until_up(port)
        async with connect(f"ws://127.0.0.1:{port}/idle/ann", ping_interval=None) as client:
            deadline = time.monotonic() + 15
            while (left := deadline - time.monotonic()) > 0:
                try:
                    await asyncio.wait_for(client.recv(), left)
                except asyncio.TimeoutError:
                    break
                await client.send("pong")
            assert server.probe()["clients"] == ["ann"]
