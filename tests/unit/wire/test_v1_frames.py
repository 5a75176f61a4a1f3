"""Tests of the frames of `stabilizer.v1.json`: valid ones, invalid ones, and how they are written."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import struct
import weakref
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastapi_ws_stabilizer.wire.deflate import deflate_stream
from fastapi_ws_stabilizer.wire.handshake import select_subprotocol
from fastapi_ws_stabilizer.wire.v1 import frames as v1
from fastapi_ws_stabilizer.wire.v1.frames import (
    ACK_EVERY,
    MAX_HELLO_BYTES,
    MAX_META_BYTES,
    MAX_NAME_CHARS,
    MAX_RESUME_TOKEN_CHARS,
    MAX_SEQ,
    SUBPROTOCOL,
    DelayedAcks,
    Message,
    ProtocolError,
    binary_envelope,
    control_frame,
    envelope,
    message_of,
    optional_int,
    optional_text,
    parse,
    ping_timestamp,
    require_int,
)
from fastapi_ws_stabilizer.wire.v1.hello import offered_credential, parse_hello
from tests.support.fake_link import virtually

NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Zl", "Zp"]), max_size=MAX_NAME_CHARS)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | NAMES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=10,
)


def binary(meta: bytes, payload: bytes = b"", *, kind: int = 1, length: int | None = None) -> bytes:
    """Return a binary frame with any head."""
    return struct.pack(">BH", kind, len(meta) if length is None else length) + meta + payload


# ── parsing ──


@given(st.one_of(st.text(), st.binary(), st.binary().map(lambda raw: b"\x01\x00\x02{}" + raw), JSON.map(json.dumps)))
def test_any_input_is_frame_or_protocol_error(raw: str | bytes) -> None:
    """Parsing raises only `ProtocolError`, and its result has a type."""
    try:
        frame = parse(raw)
    except ProtocolError:
        return
    assert isinstance(frame["type"], str)


@given(st.dictionaries(st.sampled_from(["type", "seq", "event", "id", "key", "room", "data", "re", "x"]), JSON))
def test_any_object_is_message_or_protocol_error(frame: dict[str, Any]) -> None:
    """Fields of any kind in any position give a message or `ProtocolError`."""
    try:
        message = message_of(parse(json.dumps(frame)))
    except ProtocolError:
        return
    assert message.seq is None or 1 <= message.seq <= MAX_SEQ
    for name in (message.event, message.id, message.key, message.room):
        assert name is None or len(name) <= MAX_NAME_CHARS


@given(st.one_of(st.text(), st.binary(), JSON.map(json.dumps), st.dictionaries(NAMES, JSON).map(json.dumps)))
def test_any_first_frame_is_hello_or_protocol_error(raw: str | bytes) -> None:
    """Parsing a hello raises only `ProtocolError`."""
    with pytest.raises(ProtocolError):
        parse_hello(raw)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "ping",
        "null",
        "7",
        '"hello"',
        "[]",
        '[{"type":"msg"}]',
        "{}",
        '{"type":null}',
        '{"type":7}',
        '{"type":["msg"]}',
        '{"type":"msg"',
        '{"type":"msg"}}',
        '{"type":"msg","data":NaN}',
        '{"type":"msg","data":-Infinity}',
        "{'type':'msg'}",
        '{"type":"msg","data":"\ud800"}',
        '{"type":"msg","data":' + "[" * 5000 + "]" * 5000 + "}",
    ],
)
def test_non_object_or_missing_type_is_malformed(text: str) -> None:
    """A text frame is one JSON object with a text as `type`."""
    with pytest.raises(ProtocolError):
        parse(text)


def test_malformed_frame_has_close_code() -> None:
    """A malformed frame closes with 4400, and an unknown version with 4406."""
    assert ProtocolError("no frame").code == 4400
    with pytest.raises(ProtocolError) as other_version:
        parse_hello('{"type":"hello","v":2,"n":1}')
    assert other_version.value.code == 4406


def test_unknown_types_and_fields_are_accepted() -> None:
    """Newer peers may send types and fields that are unknown, which is not an error."""
    assert parse('{"type":"later","x":[1]}') == {"type": "later", "x": [1]}
    message = message_of(parse('{"type":"msg","data":1,"priority":9,"seq":3}'))
    assert (message.data, message.seq) == (1, 3)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x01",
        b"\x01\x00",
        binary(b""),
        binary(b"{}"),
        binary(b'{"type":"msg"}', kind=0),
        binary(b'{"type":"msg"}', kind=2),
        binary(b'{"type":"msg"}', kind=255),
        binary(b'{"type":"msg"}', length=15),
        binary(b'{"type":"msg"}', length=13),
        binary(b'{"type":"ack","seq":1}'),
        binary(b'{"type":"hello","v":1,"n":1}'),
        binary(b'{"type":7}'),
        binary(b"[]"),
        binary(b'{"type":"msg","event":"\xff"}'),
    ],
)
def test_malformed_binary_frame_is_rejected(raw: bytes) -> None:
    """A binary frame has a head, as much meta as the head says, and a message or a reply in it."""
    with pytest.raises(ProtocolError):
        parse(raw)


def test_binary_frame_data_follows_meta() -> None:
    """The bytes after the meta are the data, even if there are none, and take precedence over `data` in the meta."""
    assert parse(binary(b'{"type":"msg","seq":4}', b"\x00\xff")) == {"type": "msg", "seq": 4, "data": b"\x00\xff"}
    assert parse(binary(b'{"type":"reply","re":"c1","data":1}'))["data"] == b""


@pytest.mark.parametrize("value", [0, 1, MAX_SEQ])
def test_numbers_up_to_2_53_minus_1_are_accepted(value: int) -> None:
    """Numbers go up to 2^53 - 1, which JavaScript represents exactly."""
    assert require_int({"type": "ack", "seq": value}, "seq") == value
    assert optional_int({"type": "ack", "seq": value}, "seq") == value


@pytest.mark.parametrize("value", [-1, MAX_SEQ + 1, 10**400, 1.0, 1.5, True, False, "1", None, [1], {}])
def test_invalid_number_is_malformed(value: Any) -> None:
    """Numbers are non-negative integers, and not booleans; a required one is not null."""
    with pytest.raises(ProtocolError, match="seq must be an integer from 0"):
        require_int({"type": "ack", "seq": value}, "seq")


def test_number_below_minimum_is_malformed() -> None:
    """A message's number is at least 1."""
    with pytest.raises(ProtocolError, match="from 1"):
        message_of({"type": "msg", "seq": 0})


def test_optional_field_may_be_null() -> None:
    """A null field counts as missing."""
    frame = {"type": "msg", "seq": None, "event": None, "id": None, "key": None, "room": None, "data": None}
    message = message_of(frame)
    assert (message.seq, message.event, message.id, message.key, message.room, message.data) == (None,) * 6
    assert optional_int({}, "seq") is None


@pytest.mark.parametrize("name", ["event", "id", "key", "room"])
def test_names_are_strings_of_limited_length(name: str) -> None:
    """Names are texts up to the maximum length."""
    assert getattr(message_of({"type": "msg", name: "x" * MAX_NAME_CHARS}), name) == "x" * MAX_NAME_CHARS
    for value in ("x" * (MAX_NAME_CHARS + 1), 7, [], {}, True):
        with pytest.raises(ProtocolError, match=f"{name} must be a string of at most {MAX_NAME_CHARS}"):
            message_of({"type": "msg", name: value})


@pytest.mark.parametrize("name", ["event", "id", "key", "room"])
@pytest.mark.parametrize("value", ["a\x00", "\r\n[ERROR] fake", "\x1b[2J", "\x9b", "\u2028"], ids=ascii)
def test_control_characters_in_name_are_rejected(name: str, value: str) -> None:
    """A name has no characters that would change the display of a line, and the error does not contain them."""
    with pytest.raises(ProtocolError, match="no control characters") as caught:
        message_of({"type": "msg", name: value})
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "packed", [b"\xff\xff", deflate_stream(b"\xff"), deflate_stream(b"{}")[:-1], deflate_stream(b"{}") * 2]
)
def test_compressed_frame_error_hides_library_text(packed: bytes) -> None:
    """Errors of zlib and Python do not reach a client."""
    with pytest.raises(ProtocolError) as caught:
        parse(b"\x02\x00\x00" + packed, 1000)
    assert str(caught.value) == "a compressed frame must be one complete raw deflate stream of UTF-8"


def test_frame_error_names_exceeded_limit() -> None:
    """The error names the limit: depth or size of a number."""
    with pytest.raises(ProtocolError, match="it is nested deeper than 64 levels"):
        parse('{"type":"msg","data":' + "[" * 64 + "]" * 64 + "}")
    with pytest.raises(ProtocolError, match="it contains a number beyond"):
        parse('{"type":"msg","data":1e999}')


def test_string_field_may_have_its_own_limit() -> None:
    """Tokens may be longer than names."""
    assert optional_text({"token": "x" * 512}, "token", 512) == "x" * 512
    with pytest.raises(ProtocolError):
        optional_text({"token": "x" * 513}, "token", 512)


@pytest.mark.parametrize(
    ("data", "raw"),
    [("hello", "hello"), (b"\x00", b"\x00"), ({"a": [1]}, '{"a":[1]}'), (None, "null"), (1.5, "1.5"), ("", "")],
)
def test_message_content_matches_that_of_plain_client(data: Any, raw: str | bytes) -> None:
    """One handler serves both kinds of clients: texts and bytes unchanged, other values as JSON."""
    assert Message(data).raw == raw


def test_message_repr_shows_truncated_data() -> None:
    """The `repr` of a message shows its data, cut to a few values and 80 characters of a text."""
    assert repr(Message({"a": 1}, event="b", id="c1", seq=3)) == "<Message event='b' id='c1' seq=3 data={'a': 1}>"
    assert len(repr(Message(["x" * 10_000] * 100))) < 700
    assert len(repr(Message(b"x" * 10_000))) < 200


# ── writing ──


@given(JSON, st.none() | NAMES, st.none() | NAMES, st.none() | NAMES, st.none() | st.integers(1, MAX_SEQ))
def test_json_message_survives_round_trip(
    data: Any, event: str | None, id_: str | None, key: str | None, seq: int | None
) -> None:
    """A message with any fields is parsed to the same fields."""
    raw = envelope("msg", data, event=event, id=id_, key=key, seq=seq)
    assert isinstance(raw, str)
    message = message_of(parse(raw))
    assert (message.data, message.event, message.id, message.key, message.seq) == (data, event, id_, key, seq)
    assert json.loads(raw).get("type") == "msg"
    assert raw.startswith('{"type":"msg"')


@given(st.binary(), st.none() | NAMES, st.none() | st.integers(1, MAX_SEQ))
def test_binary_message_survives_round_trip(data: bytes, event: str | None, seq: int | None) -> None:
    """Bytes follow their fields, and are not inspected."""
    for wrapped in (data, bytearray(data), memoryview(data)):
        raw = envelope("msg", wrapped, event=event, seq=seq)
        assert isinstance(raw, bytes)
        message = message_of(parse(raw))
        assert (message.data, message.event, message.seq) == (data, event, seq)


def test_non_finite_number_becomes_null() -> None:
    """NaN and infinities are null, as in JavaScript."""
    assert envelope("msg", [float("nan"), float("inf")]) == '{"type":"msg","data":[null,null]}'


def test_infinity_is_written_as_null() -> None:
    """Infinity becomes null, so that every frame is valid JSON."""
    assert control_frame("pong", ts=float("inf")).text == '{"type":"pong","ts":null}'


def test_unencodable_data_raises_in_sender() -> None:
    """Data that cannot be encoded raises `ValueError`."""
    with pytest.raises(ValueError, match="serialize"):
        envelope("msg", object())


def test_binary_message_meta_is_limited() -> None:
    """The meta of a binary frame is limited by its two bytes of length."""
    room = "x" * (MAX_META_BYTES - len('{"type":"msg","room":""}'))
    assert parse(binary_envelope({"type": "msg", "room": room}, b"y"))["data"] == b"y"
    with pytest.raises(ValueError, match="more than 65535"):
        binary_envelope({"type": "msg", "room": room + "x"}, b"y")


def test_control_frame_omits_none_fields() -> None:
    """Fields with `None` are not written; zero and false are."""
    assert control_frame("welcome", why=None, seq=0, ok=False).text == '{"type":"welcome","seq":0,"ok":false}'


# ── negotiation ──


def test_offered_subprotocol_is_matched_exactly() -> None:
    """The subprotocol is matched exactly, at any position of the offer."""
    assert select_subprotocol({"subprotocols": ["chat", SUBPROTOCOL]}) == SUBPROTOCOL
    for offered in ([], ["stabilizer.v2.json", "STABILIZER.V1.JSON", "stabilizer.v1.json "]):
        assert select_subprotocol({"subprotocols": offered}) is None


@pytest.mark.parametrize("token", ["secret", "ü🦊", "a" * 100, "??>>", ""])
def test_subprotocol_may_carry_base64url_credential(token: str) -> None:
    """A credential is base64url, with or without padding."""
    text = base64.urlsafe_b64encode(token.encode()).decode()
    assert offered_credential([SUBPROTOCOL, "stabilizer.auth." + text]) == token
    assert offered_credential(["stabilizer.auth." + text.rstrip("=")]) == token


@pytest.mark.parametrize("offer", [[], [SUBPROTOCOL], ["stabilizer.auth._w"], ["stabilizer.auth.A"]])
def test_unreadable_subprotocol_credential_is_ignored(offer: list[str]) -> None:
    """An invalid credential counts as missing, and raises nothing."""
    assert offered_credential(offer) is None


@given(st.text(st.characters(codec="ascii")))
def test_any_subprotocol_credential_raises_nothing(text: str) -> None:
    """Any credential among the subprotocols is parsed or ignored, and raises nothing."""
    assert isinstance(offered_credential(["stabilizer.auth." + text]), (str, type(None)))


# ── the first frame ──


def hello(**fields: Any) -> str:
    """Return a hello with some fields changed; `None` removes one."""
    frame = {"type": "hello", "v": 1, "n": 1, **fields}
    return json.dumps({name: value for name, value in frame.items() if value is not None})


def test_hello_fields_are_read() -> None:
    """All fields of a hello are parsed."""
    read = parse_hello(hello(n=7, auth="credential", resume={"token": "a.b", "seq": 42}, client="tab-1", caps=["x"]))
    assert (read.attempt, read.auth, read.token, read.seq, read.instance) == (7, "credential", "a.b", 42, "tab-1")


def test_minimal_hello_has_version_and_attempt() -> None:
    """All other fields are optional."""
    read = parse_hello(hello(n=0))
    assert (read.attempt, read.auth, read.token, read.seq, read.instance) == (0, None, None, 0, None)


def test_hello_repr_contains_no_token_or_credential() -> None:
    """The repr of a hello contains no secret."""
    read = parse_hello(hello(n=7, auth="credential", resume={"token": "a.b", "seq": 42}))
    assert repr(read) == "<Hello attempt=7 seq=42 resumes=True>"


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "msg"},
        {"v": None},
        {"v": 2},
        {"v": "1"},
        {"n": None},
        {"n": -1},
        {"n": 1.5},
        {"n": "1"},
        {"n": MAX_SEQ + 1},
        {"resume": "a.b"},
        {"resume": []},
        {"resume": {}},
        {"resume": {"token": "a.b"}},
        {"resume": {"token": "a.b", "seq": -1}},
        {"resume": {"token": "a.b", "seq": None}},
        {"resume": {"token": None, "seq": 1}},
        {"resume": {"token": 7, "seq": 1}},
        {"resume": {"token": "x" * (MAX_RESUME_TOKEN_CHARS + 1), "seq": 1}},
        {"auth": 7},
        {"auth": {"token": "x"}},
        {"client": 7},
        {"client": "x" * (MAX_NAME_CHARS + 1)},
    ],
    ids=str,
)
def test_hello_with_invalid_field_is_malformed(fields: dict[str, Any]) -> None:
    """A hello with an invalid field is malformed."""
    frame = {"type": "hello", "v": 1, "n": 1, **fields}
    with pytest.raises(ProtocolError):
        parse_hello(json.dumps({name: value for name, value in frame.items() if value is not None or name == "resume"}))


def test_binary_hello_is_malformed() -> None:
    """A binary first frame is malformed, whatever it contains."""
    with pytest.raises(ProtocolError):
        parse_hello(hello().encode())


def test_hello_at_byte_limit_is_accepted() -> None:
    """The limit of a hello is in bytes, and inclusive."""
    room = MAX_HELLO_BYTES - len(hello(auth=""))
    assert len(parse_hello(hello(auth="x" * room)).auth or "") == room
    with pytest.raises(ProtocolError, match="8192 bytes"):
        parse_hello(hello(auth="x" * (room + 1)))
    frame = json.dumps({"type": "hello", "v": 1, "n": 1, "auth": "é" * (room // 2 + 1)}, ensure_ascii=False)
    assert len(frame) < MAX_HELLO_BYTES < len(frame.encode())
    with pytest.raises(ProtocolError, match="8192 bytes"):
        parse_hello(frame)


def test_hello_over_byte_limit_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hello above the limit is not parsed, so that an unauthenticated peer costs little."""
    monkeypatch.setattr(v1, "read_json", lambda *_, **__: pytest.fail("parsed"))
    with pytest.raises(ProtocolError):
        parse_hello("{" + " " * MAX_HELLO_BYTES)


@pytest.mark.parametrize("ts", [None, 0, 17, -1, 1.5, 1767225600123, "", "x" * 64])
def test_ping_returns_number_or_short_text(ts: Any) -> None:
    """A pong returns the number or short text of its ping; `null` counts as missing."""
    assert ping_timestamp({"type": "ping", "ts": ts}) == ts
    assert ping_timestamp({"type": "ping"}) is None


@pytest.mark.parametrize("ts", ["x" * 65, True, [], [1], {}, {"a": 1}])
def test_ping_with_other_timestamp_is_malformed(ts: Any) -> None:
    """Pongs are queued for a client that does not read, so their size is limited."""
    with pytest.raises(ProtocolError, match="ping: ts must be a number or a string of at most 64 characters") as caught:
        ping_timestamp({"type": "ping", "ts": ts})
    assert caught.value.code == 4400


# ── acknowledging ──


class Receiver:
    """A side of the protocol that notes the times of its acknowledgements."""

    def __init__(self, delay: float = 1.0) -> None:
        self.acks = DelayedAcks(delay)
        self.sent_at: list[float] = []

    def receive(self, count: int = 1) -> None:
        """Receive messages."""
        for _ in range(count):
            self.acks.schedule(self.send_ack)

    def send_ack(self) -> None:
        """Send an acknowledgement."""
        self.acks.reset()
        self.sent_at.append(asyncio.get_running_loop().time())


def now() -> float:
    """Return the virtual time."""
    return asyncio.get_running_loop().time()


@virtually
async def test_ack_follows_first_message_after_delay() -> None:
    """One acknowledgement covers the messages of one delay, which starts at the first of them."""
    side, began = Receiver(delay=1.0), now()
    side.receive()
    await asyncio.sleep(0.9)
    side.receive()
    assert side.sent_at == []
    await asyncio.sleep(5)
    assert [round(at - began, 3) for at in side.sent_at] == [1.0]


@virtually
async def test_full_batch_is_acked_at_once() -> None:
    """`ACK_EVERY` messages are acknowledged at once, and the next message starts a new count and a new delay."""
    side = Receiver()
    side.receive(ACK_EVERY - 1)
    assert side.sent_at == []
    side.receive(ACK_EVERY)
    assert len(side.sent_at) == 1
    side.receive()
    assert len(side.sent_at) == 2
    await asyncio.sleep(5)
    assert len(side.sent_at) == 2


@virtually
async def test_reset_stops_timer_and_count() -> None:
    """After `reset` neither the timer nor the count of earlier messages leads to an acknowledgement."""
    side = Receiver()
    side.receive(ACK_EVERY - 1)
    side.acks.reset()
    side.receive(ACK_EVERY - 1)
    side.acks.reset()
    await asyncio.sleep(5)
    assert side.sent_at == []


@virtually
async def test_reset_acks_leave_owner_to_reference_counting() -> None:
    """An owner that has called `reset` is freed at once, without the garbage collector."""
    side = Receiver()
    side.receive()
    side.acks.reset()
    alive = weakref.ref(side)
    gc.disable()
    try:
        del side
        assert alive() is None
    finally:
        gc.enable()
