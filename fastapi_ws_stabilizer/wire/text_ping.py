"""Pings and pongs as text frames, for plain clients.

Only an exact match is a control frame, so application data is never mistaken for one. Control frames are the texts
`ping` and `pong`, and JSON objects of at most 64 characters with the `type` `"ping"` or `"pong"` and no other key but
`ts`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from fastapi_ws_stabilizer.wire.encoded import EncodedMessage, encode_json
from fastapi_ws_stabilizer.wire.strict_json import InvalidJsonError, read_json

MAX_CONTROL_CHARS: Final = 64

PING: Final = EncodedMessage('{"type":"ping"}')
"""Heartbeat of the server."""

_TEXT_PONG: Final = EncodedMessage("pong")
_KEYS: Final = {"type", "ts"}


@dataclass(frozen=True)
class TextPong:
    """Answer of the peer to a ping."""


@dataclass(frozen=True)
class TextPing:
    """Ping of the peer, which expects an answer.

    Attributes:
        answer: The message to send back.
    """

    answer: EncodedMessage


_PONG: Final = TextPong()
_TEXT_PING: Final = TextPing(_TEXT_PONG)


def parse_text_ping(text: str) -> TextPing | TextPong | None:
    """Parse a control frame; return `None` for application data.

    Hot path: it runs for every text message, so it checks the length and the first character before it parses.
    """
    if len(text) > MAX_CONTROL_CHARS or text[:1] not in ("p", "{"):
        return None
    if text == "pong":
        return _PONG
    if text == "ping":
        return _TEXT_PING
    if text[0] == "p" or '"type"' not in text:
        return None
    try:
        value: Any = read_json(text)
    except InvalidJsonError:
        return None
    if not isinstance(value, dict) or not value.keys() <= _KEYS:
        return None
    if value.get("type") == "pong":
        return _PONG
    if value.get("type") != "ping":
        return None
    if "ts" not in value:
        return TextPing(encode_json({"type": "pong"}))
    return TextPing(encode_json({"type": "pong", "ts": value["ts"]}))
