"""Offers of a client in its handshake: subprotocols with a credential in them, and compression."""

from __future__ import annotations

import base64
import zlib
from typing import Final

from websockets.exceptions import InvalidHeader, NegotiationError
from websockets.extensions.permessage_deflate import PerMessageDeflate
from websockets.frames import Frame, Opcode
from websockets.headers import parse_extension

from fastapi_ws_stabilizer.servers.uvicorn.deflate import DEFLATE, MessageInflater
from fastapi_ws_stabilizer.wire.handshake import select_subprotocol
from fastapi_ws_stabilizer.wire.v1.frames import AUTH_PREFIX, SUBPROTOCOL
from fastapi_ws_stabilizer.wire.v1.hello import offered_credential
from tests.fuzz.choices import Choices, text_of

LIMIT: Final = 1 << 12
WINDOW: Final = 1 << 15


def negotiation(data: bytes) -> None:
    """Use a line for the subprotocols, a line for the extensions, and the rest for compressed messages."""
    first, _, rest = data.partition(b"\n")
    second, _, third = rest.partition(b"\n")
    offers_subprotocols([one.strip() for one in text_of(first).split(",")])
    offers_extensions(second.decode("latin-1"))
    inflates(15, third)


def offers_subprotocols(offered: list[str]) -> None:
    """Check that a client's list is parsed, or that nothing is found in it."""
    assert select_subprotocol({"subprotocols": offered}) == (SUBPROTOCOL if SUBPROTOCOL in offered else None)
    credential = offered_credential(offered)
    if credential is None:
        return
    assert len(credential) <= max(map(len, offered))
    spelt = base64.urlsafe_b64encode(credential.encode()).decode().rstrip("=")
    assert offered_credential([f"{AUTH_PREFIX}{spelt}"]) == credential


def offers_extensions(header: str) -> list[PerMessageDeflate]:
    """Check that an agreement can be answered, and compresses in both directions."""
    try:
        extensions = parse_extension(header)
    except InvalidHeader:
        return []
    agreed: list[PerMessageDeflate] = []
    for name, parameters in extensions:
        if name != DEFLATE.name:
            continue
        try:
            answer, extension = DEFLATE.process_request_params(parameters, [])
        except NegotiationError:
            continue
        said = dict(answer)
        assert {"server_no_context_takeover", "client_no_context_takeover"} <= said.keys()
        assert 9 <= extension.local_max_window_bits <= 15
        assert 8 <= extension.remote_max_window_bits <= 15
        _deflates_and_inflates(extension, header.encode() * 3)
        agreed.append(extension)
    return agreed


def _deflates_and_inflates(extension: PerMessageDeflate, payload: bytes) -> None:
    bits = max(9, extension.remote_max_window_bits)  # zlib uses 9 instead of 8 when it compresses
    if extension.remote_max_window_bits >= 9:
        for _ in range(2):  # without context takeover each message is compressed independently
            packed = zlib.compressobj(wbits=-bits)
            data = (packed.compress(payload) + packed.flush(zlib.Z_SYNC_FLUSH))[:-4]
            half = len(data) // 2
            inflater = MessageInflater(extension.remote_max_window_bits)
            first = inflater.inflate(data[:half], len(payload), last=False)
            assert first + inflater.inflate(data[half:], len(payload) - len(first), last=True) == payload
    sent = extension.encode(Frame(Opcode.BINARY, payload))
    raw = zlib.decompressobj(wbits=-extension.local_max_window_bits)
    assert raw.decompress(bytes(sent.data) + b"\x00\x00\xff\xff") == payload


def inflates(window_bits: int, data: bytes) -> None:
    """Check that the pieces of any compressed messages are inflated up to the limit or rejected."""
    choices = Choices(data)
    inflater, left = MessageInflater(window_bits), LIMIT
    while choices:
        last = bool(choices.number() & 2)
        try:
            came = inflater.inflate(choices.take(choices.number()), left, last=last)
        except ValueError:
            return
        assert len(came) <= left
        left -= len(came)
        assert len(inflater._window) <= WINDOW
        if last:
            inflater, left = MessageInflater(window_bits), LIMIT
