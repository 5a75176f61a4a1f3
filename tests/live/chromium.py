"""Headless Chromium, controlled over the DevTools protocol."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from websockets.asyncio.client import ClientConnection, connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page:
    """One tab.

    Args:
        devtools: DevTools connection of the tab.
    """

    def __init__(self, devtools: ClientConnection) -> None:
        self._devtools = devtools
        self._ids = itertools.count(1)

    async def run(self, script: str) -> Any:
        """Evaluate a script and return its value, or the result of its promise."""
        number = next(self._ids)
        params = {"expression": script, "awaitPromise": True, "returnByValue": True}
        await self._devtools.send(json.dumps({"id": number, "method": "Runtime.evaluate", "params": params}))
        while True:
            answer = json.loads(await asyncio.wait_for(self._devtools.recv(), 10))
            if answer.get("id") == number:
                result = answer["result"]
                assert "exceptionDetails" not in result, result["exceptionDetails"]
                return result["result"].get("value")

    async def until(self, script: str, timeout: float = 8.0) -> Any:
        """Evaluate a script until its value is true, and return the value."""
        deadline = time.monotonic() + timeout
        while not (value := await self.run(script)):
            assert time.monotonic() < deadline, f"not within {timeout} s: {script}"
            await asyncio.sleep(0.02)
        return value


class Browser:
    """Chromium process with its own profile."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._process: asyncio.subprocess.Process | None = None
        self._connections: list[ClientConnection] = []
        self._host = ""

    async def __aenter__(self) -> Browser:
        assert CHROMIUM is not None, "chromium is not installed"
        port_file = Path(self._folder.name) / "DevToolsActivePort"
        self._process = await asyncio.create_subprocess_exec(
            CHROMIUM,
            "--headless",
            "--no-sandbox",  # the sandbox does not work for root, as in a container
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--remote-debugging-port=0",
            f"--user-data-dir={self._folder.name}",
            "about:blank",
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 20
        while not (port_file.exists() and port_file.read_text().count("\n")):
            assert self._process.returncode is None, "chromium did not start"
            assert time.monotonic() < deadline, "chromium is not up within 20 s"
            await asyncio.sleep(0.05)
        port, path = port_file.read_text().split()
        self._host = f"ws://127.0.0.1:{port}"
        self._connections.append(await connect(f"{self._host}{path}"))
        return self

    async def __aexit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        for connection in self._connections:
            await connection.close()
        if self._process is not None:
            if self._process.returncode is None:
                os.killpg(self._process.pid, signal.SIGKILL)
            await self._process.wait()
        self._folder.cleanup()

    async def open(self, url: str) -> Page:
        """Open a page in its own tab, and wait until it is loaded."""
        await self._connections[0].send(json.dumps({"id": 1, "method": "Target.createTarget", "params": {"url": url}}))
        while True:
            answer = json.loads(await asyncio.wait_for(self._connections[0].recv(), 10))
            if answer.get("id") == 1:
                break
        devtools = await connect(f"{self._host}/devtools/page/{answer['result']['targetId']}")
        self._connections.append(devtools)
        page = Page(devtools)
        await page.until(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")
        return page
