"""Inputs that are almost valid: valid ones, and valid ones with mutations."""

from __future__ import annotations

import json
import zlib

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from fastapi_ws_stabilizer.wire.v1.frames import MAX_SEQ

NUMBERS = (
    st.sampled_from(["1", "2", "1e400", "-1e400"])
    | st.sampled_from(
        ["0", "-0", "1", "2", "1.0", "1e400", "-1e400", "1e-400", f"{MAX_SEQ}", f"{MAX_SEQ + 1}", "true", "null"]
    )
    | st.integers(-2, 40).map(str)
    | st.sampled_from(["9" * 400, "9" * 5000, "NaN", "Infinity", "01", "1.", '"1"', "[1]"])
)
"""Numbers that may be in JSON, and some that may not."""

VALUES = (
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=6,
    ).map(json.dumps)
    | NUMBERS
    | st.sampled_from(['"\\ud800"', '"\\u0000"', "[" * 300 + "]" * 300, "[" * 150 + "]" * 150, '{"a":1,"a":2}'])
)
"""JSON values as text, including hostile ones."""

WORDS = st.sampled_from(['"a"', '"k"', '""', "null", "7", json.dumps("x" * 257), '"' + "\u00e9" * 256 + '"']) | VALUES


@st.composite
def v1_frames(draw: DrawFn) -> str:
    """Draw a text frame of `stabilizer.v1.json` with the required fields, most of them valid."""
    kind = draw(
        st.sampled_from(["msg", "msg", "msg", "ack", "ping", "pong", "reply", "auth", "hello", "welcome", "x", "msg "])
    )
    fields = {"type": json.dumps(kind)}
    for name in draw(st.lists(st.sampled_from(["seq", "ts", "ack", "v", "n", "in"]), max_size=4)):
        fields[name] = draw(NUMBERS)
    for name in draw(
        st.lists(st.sampled_from(["event", "id", "key", "room", "re", "token", "client", "auth"]), max_size=4)
    ):
        fields[name] = draw(WORDS)
    for name in draw(st.lists(st.sampled_from(["data", "error", "resume", "caps", "ts"]), max_size=2)):
        fields[name] = draw(VALUES)
    return "{" + ",".join(f"{json.dumps(name)}:{value}" for name, value in fields.items()) + "}"


@st.composite
def hellos(draw: DrawFn) -> str:
    """Draw a first frame, with a token or without."""
    fields = [
        '"type":"hello"',
        f'"v":{draw(st.sampled_from(["1"] * 8 + ["2", "null"]))}',
        f'"n":{draw(st.integers(1, 40) | NUMBERS)}',
    ]
    fields += draw(st.lists(st.sampled_from(['"client":"c"', '"caps":["deflate-raw"]', '"caps":[[]]', '"auth":"x"'])))
    token = draw(st.sampled_from(["$TOKEN", "$TOKEN ", "x.y", "", "$TOKEN$TOKEN"]))
    if draw(st.booleans()):
        fields.append(f'"resume":{{"token":"{token}","seq":{draw(NUMBERS)}}}')
    return "{" + ",".join(fields) + "}"


def binary_frames() -> SearchStrategy[bytes]:
    """Draw binary frames of all kinds, with lengths that agree or do not."""
    meta = v1_frames().map(str.encode)
    right = st.tuples(meta, st.binary(max_size=64)).map(lambda one: b"\x01" + _short(one[0]) + one[0] + one[1])
    wrong = st.tuples(st.integers(0, 255), st.integers(0, 0xFFFF), meta).map(
        lambda one: bytes([one[0]]) + one[1].to_bytes(2, "big") + one[2]
    )
    packed = (meta | st.integers(0, 10**5).map(lambda size: b" " * size)).map(
        lambda text: b"\x02\x00\x00" + raw_deflate(text)
    )
    return right | wrong | packed | st.binary(max_size=64)


def _short(meta: bytes) -> bytes:
    return min(len(meta), 0xFFFF).to_bytes(2, "big")


def raw_deflate(data: bytes, *, whole: bool = True) -> bytes:
    """Return some bytes compressed, ended as a stream or as a block."""
    packer = zlib.compressobj(wbits=-15)
    packed = packer.compress(data)
    return packed + packer.flush() if whole else (packed + packer.flush(zlib.Z_SYNC_FLUSH))[:-4]


@st.composite
def mutated(draw: DrawFn, valid: SearchStrategy[bytes]) -> bytes:
    """Draw valid bytes with a few mutations."""
    data = bytearray(draw(valid))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data)))
        how = draw(st.integers(0, 3))
        if how == 0:
            data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
        elif how == 1:
            data[at:at] = draw(st.binary(max_size=4))
        elif how == 2:
            del data[at : at + draw(st.integers(1, 8))]
        else:
            data[at:at] = data[: draw(st.integers(0, 32))]
    return bytes(data)


# ── frames of RFC 6455, as a client sends them ──


def client_frame(opcode: int, payload: bytes, *, fin: bool = True, rsv: int = 0, mask: bytes = b"\0\0\0\0") -> bytes:
    """Return one masked frame."""
    first = bytes([(0x80 if fin else 0) | rsv | opcode])
    length = len(payload)
    if length < 126:
        head = bytes([0x80 | length])
    elif length < 65536:
        head = b"\xfe" + length.to_bytes(2, "big")
    else:
        head = b"\xff" + length.to_bytes(8, "big")
    return first + head + mask + bytes(byte ^ mask[at % 4] for at, byte in enumerate(payload))


MASKS = st.sampled_from([b"\0\0\0\0", b"\1\2\3\4", b"\xff\xff\xff\xff"])


@st.composite
def conversations(draw: DrawFn) -> tuple[list[str | bytes], bytes]:
    """Draw messages and their frames: fragmented, with pings between them, compressed."""
    messages: list[str | bytes] = []
    stream = b""
    for message in draw(st.lists(st.text(max_size=40) | st.binary(max_size=40) | st.just("y" * 2000), max_size=8)):
        if message in ("ping", "pong") or (isinstance(message, str) and message.startswith("{")):
            continue  # a control frame, or possibly one
        messages.append(message)
        payload, opcode = (message.encode(), 1) if isinstance(message, str) else (message, 2)
        parts = draw(st.integers(1, 3))
        size = len(payload) // parts + 1
        pieces = [payload[at : at + size] for at in range(0, len(payload), size)] or [b""]
        for position, piece in enumerate(pieces):
            last = position == len(pieces) - 1
            stream += client_frame(0 if position else opcode, piece, fin=last, mask=draw(MASKS))
            if draw(st.booleans()):
                stream += client_frame(draw(st.sampled_from([9, 10])), draw(st.binary(max_size=5)))
    return messages, stream


def any_frames() -> SearchStrategy[bytes]:
    """Draw frames of which any may break the protocol."""

    def one(opcode: int, payload: bytes, fin: bool, rsv: int) -> bytes:
        return client_frame(opcode, payload, fin=fin, rsv=rsv)

    payloads = (
        st.binary(max_size=30)
        | v1_frames().map(str.encode)
        | hellos().map(str.encode)
        | st.sampled_from([b"\x03\xe8bye", b"\x03\xed", b"x" * 126, b"x" * 2048, b"x" * 2049, b"\xff"])
        | st.binary(max_size=60).map(lambda data: raw_deflate(data * 50, whole=False))
        | st.binary(max_size=60).map(lambda data: raw_deflate(data * 50))
    )
    opcodes = st.sampled_from([0, 1, 1, 1, 2, 2, 8, 9, 10, 3])
    rsvs = st.sampled_from([0, 0, 0, 0x40, 0x40, 0x20])
    frames = st.builds(one, opcodes, payloads, st.sampled_from([True, True, False]), rsvs)
    return st.lists(frames, max_size=6).map(b"".join)
