"""Upgrade request as uvicorn's HTTP protocols pass it on, read without a second HTTP parser.

uvicorn has parsed the request before it puts it together again for a WebSocket protocol. The parser of `websockets`
takes it apart line by line, which is more than half of the CPU time of an upgrade.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from websockets.datastructures import Headers
from websockets.http11 import Request

MAX_BYTES: Final = 8192
"""Maximum size of a request that is read here, below every limit of the parser of `websockets`."""

_request: Final = re.compile(
    rb"GET ([!-~]+) HTTP/1\.1\r\n((?:[-!#$%&'*+.^_`|~0-9A-Za-z]+:[\t -~]*\r\n){1,128})\r\n"
).fullmatch
"""One whole request: method, path and header lines in ASCII, of the syntax of RFC 9110, and nothing behind it."""

_SHARED: Final = {
    part: part
    for part in (
        *(b"host", b"connection", b"upgrade", b"origin", b"user-agent", b"accept", b"accept-encoding", b"cookie"),
        *(b"accept-language", b"cache-control", b"pragma", b"authorization", b"x-forwarded-for", b"x-forwarded-proto"),
        *(b"x-forwarded-host", b"x-real-ip", b"sec-websocket-version", b"sec-websocket-key", b"sec-fetch-dest"),
        *(b"sec-websocket-extensions", b"sec-websocket-protocol", b"sec-fetch-mode", b"sec-fetch-site"),
        *(b"Upgrade", b"upgrade, keep-alive", b"keep-alive, Upgrade", b"websocket", b"13", b"no-cache", b"same-origin"),
        *(b"gzip, deflate", b"gzip, deflate, br", b"gzip, deflate, br, zstd", b"permessage-deflate", b"https", b"http"),
        *(b"permessage-deflate; client_max_window_bits", b"stabilizer.v1.json"),
    )
}
"""Names and values of headers that very many clients send."""

_OF_BODY: Final = frozenset({"content-length", "transfer-encoding"})


def read_request(data: bytes) -> Request | None:
    """Return the request in some bytes; `None` if the parser of `websockets` must decide what they are.

    That parser also accepts or rejects everything that is not read here: a request in several parts, with a body, not
    in ASCII, or large.
    """
    if len(data) > MAX_BYTES or (match := _request(data)) is None:
        return None
    headers = []
    for line in match[2].decode("ascii").split("\r\n")[:-1]:
        name, _, value = line.partition(":")
        if name.lower() in _OF_BODY:
            return None
        headers.append((name, value.strip(" \t")))
    return Request(match[1].decode("ascii"), Headers(headers))


def with_shared_parts(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return equal headers, in which frequent names and values are objects that all connections share.

    The scope of a connection has its headers until its end.
    """
    shared = _SHARED.get
    return [(shared(name, name), shared(value, value)) for name, value in headers]
