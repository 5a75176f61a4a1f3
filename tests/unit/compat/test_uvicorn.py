"""Tests of a real uvicorn of the installed version: with the protocol class, or with the fallback."""

from __future__ import annotations

import ast
import importlib
import logging
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

import fastapi_ws_stabilizer
from fastapi_ws_stabilizer import StableSocketDep, WebSocketConnectionManager
from fastapi_ws_stabilizer.servers.detect import websocket_library_advice
from tests.support.fake_websocket import with_deadline
from tests.support.uvicorn_server import served
from tests.support.versions import HAS_DIRECT_TRANSPORT, HAS_PROTOCOL_CLASS


def make() -> tuple[WebSocketConnectionManager, FastAPI]:
    """An app that echoes."""
    manager = WebSocketConnectionManager()
    app = FastAPI(lifespan=manager.lifespan)

    @app.websocket("/ws/{client_id}")
    async def endpoint(ws: StableSocketDep) -> None:
        async for message in ws:
            await ws.send(message)

    return manager, app


async def test_installed_uvicorn_serves_with_manager_options(caplog: pytest.LogCaptureFixture) -> None:
    """Messages, the close code and the shutdown work on every uvicorn, and a fallback is logged."""
    manager, app = make()
    with caplog.at_level(logging.WARNING, "fastapi_ws_stabilizer"):
        async with served(app, **manager.uvicorn_options()) as url:
            client = await with_deadline(connect(url))
            await client.send("hello")
            assert await with_deadline(client.recv()) == "hello"
            (ws,) = manager.get_sockets()
            is_direct = ws._connection.is_direct
            await manager.disconnect("ann", 4000, "bye")
            with pytest.raises(ConnectionClosed) as closed:
                await with_deadline(client.recv())
    assert closed.value.rcvd is not None
    assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4000, "bye")
    assert is_direct == HAS_DIRECT_TRANSPORT
    events = [getattr(record, "event", "") for record in caplog.records]
    assert ("uvicorn_internals_unknown" in events) == (not is_direct)


def test_installed_uvicorn_has_websocket_library() -> None:
    """The extra `uvicorn` brings a WebSocket library."""
    assert websocket_library_advice() is None


# ── the lists of attributes ──

FOLDER = Path(fastapi_ws_stabilizer.__file__).parent / "servers/uvicorn"
PROTOCOL = ("self", "protocol", "self._protocol")
"""What the protocol object is called in its own class, and in the class of the parser that it owns."""


def listed() -> dict[str, set[str]]:
    """Return the lists of `compat.py`, which cannot be imported with an old uvicorn."""
    return {
        node.target.id: set(ast.literal_eval(node.value))
        for node in ast.parse((FOLDER / "compat.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(node.value, ast.Tuple)
    }


def used_attributes(*sources: str) -> tuple[set[str], set[str]]:
    """Return the attributes of uvicorn's class and of its `conn` that classes use and do not define."""
    of_self: set[str] = set()
    of_conn: set[str] = set()
    own = {"__dict__"}  # an attribute of Python, not of uvicorn
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                of_init = [inner for inner in ast.walk(node) if isinstance(inner, ast.Attribute)]
                own |= {inner.attr for inner in of_init if isinstance(inner.ctx, ast.Store)}
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                own.add(node.name)
            elif isinstance(node, ast.Attribute):
                of_self |= {node.attr} if ast.unparse(node.value) in PROTOCOL else set()
                of_conn |= {node.attr} if ast.unparse(node.value) == "self.conn" else set()
    of_super = {
        node.attr
        for source in sources
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "super()" and node.attr != "__init__"
    }
    return of_self - own | of_super, of_conn


def test_used_attributes_of_uvicorn_are_listed() -> None:
    """Each attribute of uvicorn's class that the protocol class uses is in a list of `compat`, and no other is."""
    known = listed()
    of_base, of_conn = used_attributes(
        *((FOLDER / name).read_text(encoding="utf-8") for name in ("protocol.py", "paced_parser.py"))
    )
    assert of_base == known["REQUIRED_ATTRIBUTES"] | known["HANDSHAKE_ATTRIBUTES"] | known["_METHODS"]
    assert of_conn == known["_OURS_OF_CONN"]


def test_unlisted_attribute_of_uvicorn_is_found() -> None:
    """The comparison finds an attribute of the base, a method of it, and an attribute of its `conn`."""
    source = """
class Example(Base):
    def __init__(self):
        self.own = self.inherited

    def method(self):
        super().of_base()
        self.method(self.own, self.conn.of_conn)
        self._protocol.of_owned()
"""
    assert used_attributes(source) == ({"inherited", "of_base", "conn", "_protocol", "of_owned"}, {"of_conn"})


def test_uvicorn_without_base_class_is_named_in_error() -> None:
    """On a uvicorn without the base class, the import raises and names the versions; otherwise it works."""
    if HAS_PROTOCOL_CLASS:
        importlib.import_module("fastapi_ws_stabilizer.servers.uvicorn.compat")
        return
    with pytest.raises(ImportError, match=f"needs uvicorn 0.35 or newer .* but this is uvicorn {uvicorn.__version__}"):
        importlib.import_module("fastapi_ws_stabilizer.servers.uvicorn.compat")
