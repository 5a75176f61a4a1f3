"""Tests of `python -m fastapi_ws_stabilizer drain`: its request, and its output for each answer."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fastapi_ws_stabilizer.cli import main

SECRET = "drained-by-the-owner-only"
REPORT = {"closed_count": 3, "failed_count": 0, "duration_seconds": 0.1}

Answered = Callable[[bytes], tuple[str, list[bytes]]]


def answer(status: str, body: bytes = b"", *headers: str) -> bytes:
    """Return an HTTP response."""
    lines = (f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers)
    return "\r\n".join((*lines, "", "")).encode() + body


@pytest.fixture
def answered() -> Iterator[Answered]:
    """Start a server that answers every request with the same bytes; yield its address and the requests."""
    listeners = []

    def start(response: bytes) -> tuple[str, list[bytes]]:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)
        heard: list[bytes] = []

        def serve() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                with client:
                    heard.append(client.recv(65536))
                    client.sendall(response)

        threading.Thread(target=serve, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}/ws-stats", heard

    yield start
    for listener in listeners:
        with contextlib.suppress(OSError):  # on some systems closing the socket alone does not wake the accept
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()


@pytest.fixture
def drain(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Run the command with a secret; return its exit code and its output."""

    def run(*arguments: str, secret: str = SECRET) -> tuple[int, str, str]:
        monkeypatch.setenv("WS_DRAIN_SECRET", secret)
        code = main(["drain", *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_drain_prints_result_and_exits_0_or_1(drain: Any, answered: Answered) -> None:
    """The exit code is 0 if all connections closed in time, and 1 if some were cut."""
    url, heard = answered(answer("200 OK", json.dumps(REPORT).encode()))
    code, out, err = drain(url, "--timeout", "7")
    assert (code, json.loads(out), err) == (0, REPORT, "")
    assert heard[0].startswith(b"POST /ws-stats/drain?timeout=7.0 HTTP/1.1\r\n")
    assert f"authorization: bearer {SECRET}\r\n".encode() in heard[0].lower()
    url, _ = answered(answer("200 OK", json.dumps({**REPORT, "failed_count": 1}).encode()))
    assert drain(url)[0] == 1


@pytest.mark.parametrize("secret", [f"{SECRET}\n", f" {SECRET}\r\n"])
def test_trailing_newline_of_secret_is_stripped(drain: Any, answered: Answered, secret: str) -> None:
    """`kubectl create secret --from-file` keeps the newline of the file, so the command strips it."""
    url, heard = answered(answer("200 OK", json.dumps(REPORT).encode()))
    assert drain(url, secret=secret)[0] == 0
    assert f"authorization: bearer {SECRET}\r\n".encode() in heard[0].lower()


def test_secret_may_contain_latin_1_characters(drain: Any, answered: Answered) -> None:
    """The secret may contain characters of Latin-1, as the server reads them."""
    url, heard = answered(answer("200 OK", json.dumps(REPORT).encode()))
    assert drain(url, secret=f"{SECRET}-\u00fc")[0] == 0
    assert f"{SECRET}-\u00fc\r\n".encode("latin-1") in heard[0]


@pytest.mark.parametrize("secret", [f"{SECRET}\nX-More: 1", f"{SECRET}\u20ac", f"{SECRET}\x01"])
def test_invalid_header_secret_is_neither_printed_nor_sent(drain: Any, answered: Answered, secret: str) -> None:
    """The error names the invalid variable, and no request is sent."""
    url, heard = answered(answer("200 OK", json.dumps(REPORT).encode()))
    assert drain(url, secret=secret) == (
        2,
        "",
        "WS_DRAIN_SECRET contains a character that an HTTP header cannot carry\n",
    )
    assert heard == []


def test_blank_secret_is_error(drain: Any) -> None:
    """A secret of white space counts as missing."""
    code, _, err = drain("http://127.0.0.1:9", secret=" \n")
    assert (code, err) == (2, "no secret: set WS_DRAIN_SECRET to the server's drain_secret\n")


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy"])
def test_secret_is_not_sent_to_proxy(
    drain: Any, answered: Answered, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The command ignores proxies in the environment."""
    proxy, seen = answered(answer("502 Bad Gateway"))
    monkeypatch.setenv(name, proxy)
    monkeypatch.delenv("no_proxy", raising=False)
    url, _ = answered(answer("200 OK", json.dumps(REPORT).encode()))
    assert drain(url)[0] == 0
    assert seen == []


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
def test_redirect_is_not_followed_with_secret(drain: Any, answered: Answered, status: str) -> None:
    """A redirect is an error that names its target."""
    elsewhere, seen = answered(answer("200 OK", json.dumps(REPORT).encode()))
    url, _ = answered(answer(status, b"", f"Location: {elsewhere}/drain"))
    code, out, err = drain(url)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"redirected: HTTP {status[:3]} to {elsewhere}/drain")
    assert seen == []


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (b"", "no answer: "),
        (b"SSH-2.0-OpenSSH_9.9\r\n", "no answer: SSH-2.0"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 90\r\n\r\n{", "not a drain report: {"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "no answer: "),
        (answer("302 Found", b"", "Location: http://[::1/"), "no answer: Invalid IPv6 URL"),
        (answer("200 OK", b"<html>\n<p>hello"), "not a drain report: <html> <p>hello"),
        (answer("200 OK", b"\xff\xfe"), "not a drain report: "),
        (answer("200 OK", b"[" * 60000), "not a drain report: [[["),
        (answer("200 OK", b"[]"), "not a drain report: []"),
        (answer("200 OK", b"3"), "not a drain report: 3"),
        (answer("200 OK", b'{"status": "ok"}'), 'not a drain report: {"status": "ok"}'),
        (answer("200 OK", b'{"failed_count": false}'), "not a drain report: "),
        (answer("204 No Content"), "not a drain report:"),
        (answer("403 Forbidden", b'{"detail":\n"Forbidden"}'), 'refused: HTTP 403 {"detail": "Forbidden"}'),
        (b"HTTP/1.1 403 Forbidden\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "refused: HTTP 403"),
        (answer("500 Oh", f"you sent Bearer {SECRET}".encode()), "refused: HTTP 500 you sent Bearer ***"),
        (answer("500 Oh", b"." * 295 + SECRET.encode()), "refused: HTTP 500 ." + "." * 294 + "***"),
        (answer("200 OK", f"you sent Bearer {SECRET}".encode()), "not a drain report: you sent Bearer ***"),
        (answer("302 Found", b"", f"Location: /?was={SECRET}"), "redirected: HTTP 302 to /?was=***"),
    ],
)
def test_unexpected_answer_exits_1_with_one_line(drain: Any, answered: Answered, response: bytes, message: str) -> None:
    """An answer of another server gives one line without traceback or secret, and exit code 1."""
    url, _ = answered(response)
    code, out, err = drain(url)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(message)
    assert SECRET not in err


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8000/ws-stats",
        "ftp://127.0.0.1/ws-stats",
        "file:///etc/hostname",
        "http://",
        "http:///ws-stats",
        "http://127.0.0.1:http/ws-stats",
        "http://127.0.0.1:99999/ws-stats",
        "http://[::1/ws-stats",
        "http://127.0.0.1/ws stats",
        "http://127.0.0.1/ws-stats\r\nX-More: 1",
        "http://127.0.0.1/ws-st\u00e4ts",
        "http://127.0.0.1/ws-stats?a=b",
        "http://127.0.0.1/ws-stats#a",
        "http://ann:password@127.0.0.1/ws-stats",
        "http://a..b/ws-stats",
    ],
)
def test_invalid_url_exits_2_with_one_line(drain: Any, url: str) -> None:
    """The exit code is 2."""
    code, out, err = drain(url)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("not an http(s) URL of a stats router: ")


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "3601"])
def test_invalid_timeout_exits_2_and_sends_nothing(drain: Any, seconds: str) -> None:
    """The exit code is 2, and nothing is sent."""
    code, out, err = drain("http://127.0.0.1:9", "--timeout", seconds)
    assert (code, out) == (2, "")
    assert err == f"--timeout must be above 0 s and at most 3600 s, not {seconds}\n"


def test_refused_connection_prints_one_line(drain: Any) -> None:
    """A port on which nothing listens gives one line."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    code, out, err = drain(f"http://127.0.0.1:{port}")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("no answer: ")
