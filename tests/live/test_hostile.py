"""Hostile input on real servers gets its documented answer, and other clients are not affected."""

from __future__ import annotations

import asyncio
import json
import re
import time
import zlib
from collections.abc import AsyncIterator, Iterator
from typing import Any
from urllib.parse import quote

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus
from websockets.typing import Subprotocol

from fastapi_ws_stabilizer.wire.v1.frames import SUBPROTOCOL
from tests.support.plain_client import received_close
from tests.support.process import UVICORN_REJECTION
from tests.support.raw import RawClient
from tests.support.server import LiveServer, until
from tests.support.wire_client import (
    BINARY,
    BROWSER_OFFER,
    CONTINUATION,
    PING,
    RSV1,
    TEXT,
    PeakMemory,
    WireClient,
    close_frame,
    deflate,
    frame,
)

KINDS = ("uvicorn-sansio", "uvicorn-stable")
LIMIT = 1 << 20
HELLO_TIMEOUT = 0.5
FORGERY = "\r\n[ERROR] fake\x1b[2J\u2028"
"""Text that would start a new line in a careless log, and clear the terminal of its reader."""

ARGS = ("--ws-ping-interval", "0", "--ws-max-size", str(LIMIT))
UVICORN_UTF8_ERROR = "Invalid UTF-8 sequence received from client"
"""Error that uvicorn's own protocol class logs with a traceback, for text that is not UTF-8."""

QUIET = re.compile(r"INFO:|\S+ \S+ (INFO|WARNING) ")

MANY_BOMBS = {"uvicorn-sansio": 120 * LIMIT, "uvicorn-stable": 20 * LIMIT}
"""Limits of memory growth. uvicorn's own class inflates all messages of a 64 KiB read before it delivers the first."""

KIND_2 = b"\x02\x00\x00"
HELLO = {"type": "hello", "v": 1, "n": 1}


@pytest.fixture(scope="module", params=KINDS)
def hostile_server(request: pytest.FixtureRequest) -> Iterator[LiveServer]:
    """One server for all tests of this module, on uvicorn's own protocol class and on ours."""
    config = {"hello_timeout": HELLO_TIMEOUT, "heartbeat_type": "off", "max_message_size": LIMIT}
    with LiveServer(request.param, config=config, args=ARGS) as server:
        yield server


@pytest.fixture
async def server(hostile_server: LiveServer) -> AsyncIterator[LiveServer]:
    """That server, which must log no error while an honest client echoes."""
    before = len(crashes(hostile_server))
    async with connect(hostile_server.url("/echo/honest"), compression=None) as honest:
        stopped = asyncio.Event()
        witness = asyncio.create_task(echo(honest, stopped))
        await asyncio.sleep(0)
        yield hostile_server
        stopped.set()
        slowest = await asyncio.wait_for(witness, 5)
    assert slowest < 1.0
    assert crashes(hostile_server)[before:] == []
    log = hostile_server.log
    assert "\x1b" not in log
    assert "\u2028" not in log
    assert not any(line.startswith("[ERROR] fake") for line in log.splitlines())


def crashes(server: LiveServer) -> list[str]:
    """Return the errors in the log, except uvicorn's own and lines of a lower level that quote a client."""
    lines = iter(server.errors())
    found = []
    for line in lines:
        if UVICORN_UTF8_ERROR in line:
            next(lines)
        elif UVICORN_REJECTION not in line and not QUIET.match(line):
            found.append(line)
    return found


async def echo(client: ClientConnection, stopped: asyncio.Event) -> float:
    """Echo until `stopped` is set, and return the duration of the slowest echo."""
    slowest, number = 0.0, 0
    while not stopped.is_set() or number == 0:
        started = time.perf_counter()
        await client.send(f"{number}")
        assert await client.recv() == f"{number}"
        slowest = max(slowest, time.perf_counter() - started)
        number += 1
        await asyncio.sleep(0.01)
    return slowest


# ── messages ──

DEEP = "[" * 100 + "]" * 100

BAD_JSON: dict[str, tuple[str | bytes, str]] = {
    "deep": (f'{{"type":"echo","x":{DEEP}}}', "nested deeper than 64 levels"),
    "deepest": ("[" * (LIMIT - 10), "recursion"),
    "nan": ('{"type":"echo","x":NaN}', "not JSON"),
    "infinity": ('{"type":"echo","x":-Infinity}', "not JSON"),
    "1e999": ('{"type":"echo","x":1e999}', "it contains a number beyond"),
    "400 digits": ('{"type":"echo","x":%s}' % ("9" * 400), "it contains a number beyond"),
    "100,000 digits": ('{"type":"echo","x":%s}' % ("9" * 100_000), "number out of range"),
    "half a pair": ('{"type":"echo","x":"\\ud800"}', "not JSON"),
    "binary": (b'{"type":"echo","x":"\xff"}', "not JSON"),
    "nul": ('{"type":"echo","x":"\x00"}', "control character"),
    "nothing": ("", "not JSON"),
}


@pytest.mark.parametrize("what", BAD_JSON)
async def test_unsafe_message_gets_error_reply(server: LiveServer, what: str) -> None:
    """JSON that a handler cannot take safely is answered with `bad_json`, and the connection stays open."""
    message, text = BAD_JSON[what]
    async with connect(server.url("/run/mallory"), compression=None) as client:
        await client.send(message)
        reply = json.loads(await asyncio.wait_for(client.recv(), 5))
        assert (reply["type"], reply["code"]) == ("error", "bad_json")
        assert text in reply["message"]
        assert len(reply["message"]) < 200
        await client.send('{"type":"echo","x":"fine"}')
        assert json.loads(await asyncio.wait_for(client.recv(), 5)) == {"type": "echo", "x": "fine"}


async def test_last_duplicate_type_is_routed(server: LiveServer) -> None:
    """A message with two types is routed by the last one, which is also validated."""
    async with connect(server.url("/run/mallory")) as client:
        await client.send('{"type":"wait","type":"echo","x":1}')
        assert json.loads(await asyncio.wait_for(client.recv(), 5)) == {"type": "echo", "x": 1}


async def test_unusual_valid_json_is_handled(server: LiveServer) -> None:
    """64 levels, the largest double, 308 digits and an escaped NUL are valid."""
    strange = [
        json.loads("[" * 63 + "]" * 63),
        1.7976931348623157e308,
        int("9" * 308),
        "a\x00b",
        "🦊\u202e",
    ]
    async with connect(server.url("/run/mallory")) as client:
        for value in strange:
            await client.send(json.dumps({"type": "echo", "x": value}))
            assert json.loads(await asyncio.wait_for(client.recv(), 5)) == {"type": "echo", "x": value}


async def test_unknown_type_is_truncated_in_reply(server: LiveServer) -> None:
    """A type of 1 MiB gets a short reply without control characters."""
    async with connect(server.url("/run/mallory"), compression=None) as client:
        await client.send(json.dumps({"type": FORGERY + "x" * (LIMIT - 200)}))
        reply = json.loads(await asyncio.wait_for(client.recv(), 5))
        assert reply["code"] == "unknown_type"
        assert len(reply["message"]) < 200
        assert reply["message"].isprintable()


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (frame(TEXT, b"\xff"), 1007),
        (frame(TEXT, b"\xed\xa0\x80"), 1007),
        (frame(TEXT, b"", announced=LIMIT + 126, length_bits=64) + b"x" * 64, 1009),
        (frame(3, b""), 1002),
    ],
    ids=["no utf-8", "a surrogate", "too big", "unknown opcode"],
)
async def test_invalid_frame_closes_with_rfc_code(server: LiveServer, data: bytes, code: int) -> None:
    """A frame that breaks RFC 6455 closes with the code of the RFC."""
    with WireClient(server.port) as client:
        assert (await asyncio.to_thread(client.upgrade)).status == 101
        client.write(data)
        assert (await asyncio.to_thread(client.close_info))[0] == code


# ── frames of stabilizer.v1.json ──


def deflated(text: bytes) -> bytes:
    """Return a binary frame of kind 2."""
    packer = zlib.compressobj(9, wbits=-15)
    return KIND_2 + packer.compress(text) + packer.flush()


BAD_FRAMES: dict[str, tuple[Any, int, str]] = {
    "deep": (f'{{"type":"msg","data":{DEEP}}}', 4400, "a frame cannot be read: it is nested deeper than 64 levels"),
    "nan": ('{"type":"msg","data":NaN}', 4400, "a frame cannot be read: it is not JSON"),
    "1e999": ('{"type":"msg","data":1e999}', 4400, "a frame cannot be read: it contains a number beyond"),
    "no object": ("[]", 4400, "a frame must be a JSON object"),
    "event": ({"type": "msg", "event": "a\x00"}, 4400, "msg: event must be a string of at most 256 characters"),
    "id": ({"type": "msg", "event": "echo", "id": FORGERY}, 4400, "msg: id must be a string of at most 256 characters"),
    "key": (
        {"type": "msg", "event": "echo", "key": "x" * 257},
        4400,
        "msg: key must be a string of at most 256 characters",
    ),
    "room": (
        {"type": "msg", "event": "echo", "room": "\u2028"},
        4400,
        "msg: room must be a string of at most 256 characters",
    ),
    "second hello": (HELLO, 4400, "unexpected second hello"),
    "bomb": (deflated(b'{"type":"msg","data":"' + b" " * (50 * LIMIT) + b'"}'), 1009, "a compressed frame holds more"),
    "no deflate": (KIND_2 + b"\xff\xff", 4400, "a compressed frame must be one complete raw deflate stream of UTF-8"),
    "no utf-8 inside": (deflated(b"\xff"), 4400, "a compressed frame must be one complete raw deflate stream of UTF-8"),
}


@pytest.mark.parametrize("what", BAD_FRAMES)
async def test_invalid_v1_frame_ends_session(server: LiveServer, what: str) -> None:
    """A protocol violation closes the connection, with a reason that names it but no internals."""
    sent, code, reason = BAD_FRAMES[what]
    url = server.url("/run/mallory")
    async with connect(url, subprotocols=[Subprotocol(SUBPROTOCOL)], compression=None) as client:
        await client.send(json.dumps({**HELLO, "caps": ["deflate-raw"]}))
        assert json.loads(await asyncio.wait_for(client.recv(), 5))["type"] == "welcome"
        await client.send(sent if isinstance(sent, (str, bytes)) else json.dumps(sent))
        found = await received_close(client)
    assert found[0] == code
    assert found[1].startswith(reason)
    assert "codec" not in found[1]


@pytest.mark.parametrize(
    "hello",
    ["no json", b"\x00", DEEP, json.dumps({**HELLO, "auth": "x" * 9000}), json.dumps({**HELLO, "client": FORGERY})],
    ids=["no json", "binary", "deep", "too long", "client"],
)
async def test_invalid_hello_closes_with_4400(server: LiveServer, hello: str | bytes) -> None:
    """A first frame that is not a hello closes with 4400."""
    async with connect(server.url("/run/mallory"), subprotocols=[Subprotocol(SUBPROTOCOL)]) as client:
        await client.send(hello)
        assert (await received_close(client))[0] == 4400


# ── bombs ──


async def test_repeated_bombs_use_bounded_memory(server: LiveServer) -> None:
    """Forty frames of 1 KiB that inflate to the limit are read one at a time, so memory stays that of a few."""
    text = b'{"type":"unknown","x":"' + b" " * (LIMIT - 100) + b'"}'
    peak = await asyncio.to_thread(PeakMemory, server)
    with WireClient(server.port) as client:
        answer = await asyncio.to_thread(client.upgrade, "/run", {"Sec-WebSocket-Extensions": BROWSER_OFFER})
        assert answer.deflate is not None
        bomb = frame(TEXT, deflate(text, client.window_bits), rsv=RSV1)
        assert len(bomb) < LIMIT / 500
        client.write(bomb * 40)
        for _ in range(40):
            reply = json.loads((await asyncio.to_thread(client.message)).payload)
            assert reply["code"] == "unknown_type"
    assert await asyncio.to_thread(peak.growth) < MANY_BOMBS[server.kind]


async def test_bomb_over_limit_closes_with_1009(server: LiveServer) -> None:
    """1 KiB that would inflate to 50 MiB is inflated up to the limit only."""
    peak = await asyncio.to_thread(PeakMemory, server)
    with WireClient(server.port) as client:
        await asyncio.to_thread(client.upgrade, "/run", {"Sec-WebSocket-Extensions": BROWSER_OFFER})
        client.write(frame(BINARY, deflate(b" " * (50 * LIMIT), client.window_bits), rsv=RSV1))
        assert (await asyncio.to_thread(client.close_info))[0] == 1009
    assert await asyncio.to_thread(peak.growth) < 10 * LIMIT


# ── bugs ──


async def test_bug_details_are_hidden_from_client(hostile_server: LiveServer) -> None:
    """A failing hook answers 500 and a failing handler closes with 1011, both without details."""
    with pytest.raises(InvalidStatus) as refused:
        async with connect(hostile_server.url("/run/mallory?handshake=boom")):
            pass
    assert refused.value.response.status_code == 500
    assert json.loads(refused.value.response.body or b"") == {"detail": "Internal Server Error"}
    async with connect(hostile_server.url("/run/mallory")) as client:
        await client.send('{"type":"boom"}')
        code, reason = await received_close(client)
    assert code == 1011
    assert reason == "internal error"


# ── client ids ──


@pytest.mark.parametrize("client_id", ["x" * 200, "🦊", "ann@example.com", "a.b.c"])
async def test_printable_client_ids_are_accepted(server: LiveServer, client_id: str) -> None:
    """Long names, emoji, email addresses and dots are valid client ids."""
    async with connect(server.url(f"/echo/{quote(client_id)}")) as client:
        await client.send("hi")
        assert await asyncio.wait_for(client.recv(), 5) == "hi"
        connections = await asyncio.to_thread(server.get, f"/ws-stats/connections?client_id={quote(client_id)}")
        assert [one["client_id"] for one in connections["connections"]] == [client_id]


@pytest.mark.parametrize(
    "client_id", ["x" * 257, "x" * 4000, FORGERY, "a\x00", "a\x9b2J"], ids=lambda one: ascii(one[:8])
)
async def test_invalid_client_id_gets_400_with_reason(server: LiveServer, client_id: str) -> None:
    """A client id that is too long or has a control character is rejected before accept, with the reason."""
    with pytest.raises(InvalidStatus) as refused:
        async with connect(server.url(f"/echo/{quote(client_id, safe='')}")):
            pass
    assert refused.value.response.status_code == 400
    assert b"at most 256 characters" in (refused.value.response.body or b"")


async def test_megabyte_client_id_is_rejected_and_not_logged(server: LiveServer) -> None:
    """A client id of 1 MiB, rejected by the server or the library, gets no connection and no line in the log."""
    before = len(server.log)
    with RawClient(server.port, "/echo/" + "x" * LIMIT) as client:
        try:
            assert " 4" in await asyncio.to_thread(client.handshake)
        except (ConnectionError, AssertionError):
            pass  # the server has cut the connection
    assert server.probe()["clients"] == ["honest"]
    assert len(server.log) - before < 3 * LIMIT  # the access log of uvicorn repeats it
    assert not any("x" * 1000 in line for line in server.log.splitlines() if "client_id=" in line)


# ── logs ──


async def test_client_chosen_text_does_not_forge_log_line(server: LiveServer) -> None:
    """Paths, queries, headers, subprotocols and close reasons are escaped in the log, within their line."""
    escaped = quote(FORGERY)
    with pytest.raises(InvalidStatus):
        async with connect(server.url(f"/nowhere/{escaped}")):
            pass
    headers = {
        "User-Agent": "\x9b2J",
        "X-Forwarded-For": "\x9b31m, [ERROR]",
        "Cookie": "\x9b",
    }
    with WireClient(server.port) as client:
        request = client.request("/echo", {**headers, "Origin": "\x9b2J[ERROR]"})
        client.write(request.decode("utf-8").encode("latin-1"))
        assert (await asyncio.to_thread(client.answer)).status == 403
    with WireClient(server.port) as client:
        request = client.request(f"/echo?token={escaped}&client_id={escaped}", headers)
        client.write(request.decode("utf-8").encode("latin-1"))
        assert (await asyncio.to_thread(client.answer)).status == 101
        client.write(close_frame(4000, FORGERY.encode()))
        await asyncio.to_thread(client.close_info)
        ended = f"connection_ended client_id={client.name}"
        await until(lambda: ended in server.log)
    assert "no_websocket_route" in server.log
    assert "\\r\\n[ERROR] fake\\u001b[2J\\u2028" in server.log


async def test_credential_is_not_in_log_or_stats(server: LiveServer) -> None:
    """A credential in a subprotocol or a hello is neither in the log nor in the stats."""
    secret = "c2VjcmV0LWluLXN1YnByb3RvY29s"
    offers = [Subprotocol(SUBPROTOCOL), Subprotocol(f"stabilizer.auth.{secret}")]
    async with connect(server.url("/run/mallory"), subprotocols=offers) as client:
        await client.send(json.dumps({**HELLO, "auth": "secret-in-hello"}))
        welcome = json.loads(await asyncio.wait_for(client.recv(), 5))
        stats = json.dumps(await asyncio.to_thread(server.get, "/ws-stats/connections"))
    written = server.log + stats
    for secret_text in (secret, "secret-in-subprotocol", "secret-in-hello", welcome["token"].partition(".")[2]):
        assert secret_text not in written


# ── slow handshakes ──


@pytest.mark.parametrize("action", ["nothing", "drips", "pings", "fragments"])
async def test_hello_timeout_closes_with_4408(server: LiveServer, action: str) -> None:
    """A hello in single bytes or endless fragments, or only pings, closes with 4408 after `hello_timeout`.

    Until then no connection and no session is counted.
    """
    hello = frame(TEXT, json.dumps(HELLO).encode() + b" " * 1000)
    with WireClient(server.port) as client:
        answer = await asyncio.to_thread(client.upgrade, "/run", {"Sec-WebSocket-Protocol": SUBPROTOCOL})
        assert answer.status == 101
        started = time.monotonic()
        assert (await asyncio.to_thread(server.probe))["connections"] == 1  # the honest client
        if action == "fragments":
            client.write(frame(TEXT, b"{", fin=False))
        sending = asyncio.create_task(send_slowly(client, action, hello))
        try:
            code = await asyncio.to_thread(read_close_code, client)
        finally:
            sending.cancel()
        took = time.monotonic() - started
        assert (await asyncio.to_thread(server.get, "/ws-stats/"))["sessions"] == 0
    assert code == 4408
    assert HELLO_TIMEOUT * 0.9 < took < HELLO_TIMEOUT + 1.5


async def send_slowly(client: WireClient, action: str, hello: bytes) -> None:
    """Send a little every 10 ms until the connection ends."""
    for number in range(len(hello) - 1):
        data = {
            "nothing": b"",
            "drips": hello[number : number + 1],
            "pings": frame(PING, b"x"),
            "fragments": frame(CONTINUATION, b" ", fin=False),
        }[action]
        try:
            client.write(data)
        except OSError:
            return
        await asyncio.sleep(0.01)


def read_close_code(client: WireClient) -> int:
    while True:
        found = client.next_frame()
        if found.opcode == 8:
            return int.from_bytes(found.payload[:2], "big")


async def test_invalid_utf8_close_reason_logs_no_error(server: LiveServer) -> None:
    """A close reason that is not UTF-8 closes with 1002 or 1007, and logs no error."""
    with WireClient(server.port) as client:
        await asyncio.to_thread(client.upgrade)
        client.write(close_frame(4000, b"\xff\xfe"))
        assert (await asyncio.to_thread(client.close_info))[0] in (1002, 1007)
