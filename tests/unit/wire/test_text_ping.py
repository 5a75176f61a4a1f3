"""Tests of the control frames of the plain mode."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastapi_ws_stabilizer.wire.encoded import encode
from fastapi_ws_stabilizer.wire.text_ping import MAX_CONTROL_CHARS, PING, TextPing, TextPong, parse_text_ping


@pytest.mark.parametrize(
    "text", ["pong", '{"type":"pong"}', '{"type": "pong", "ts": 7}', '{"ts":null,"type":"pong"}', '{ "type":"pong" } ']
)
def test_text_and_json_pong_are_recognised(text: str) -> None:
    """The text `pong` and an object of type `pong` answer a ping."""
    assert isinstance(parse_text_ping(text), TextPong)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("ping", "pong"),
        ('{"type":"ping"}', '{"type":"pong"}'),
        ('{"type":"ping","ts":12}', '{"type":"pong","ts":12}'),
        ('{"ts":"a","type":"ping"}', '{"type":"pong","ts":"a"}'),
        ('{"type":"ping","ts":null}', '{"type":"pong","ts":null}'),
        ('{"type":"ping","ts":1.5}', '{"type":"pong","ts":1.5}'),
        ('{"type":"ping","ts":1767225600123}', '{"type":"pong","ts":1767225600123}'),
    ],
)
def test_pong_has_same_format_as_ping(text: str, answer: str) -> None:
    """A text ping gets a text pong, a JSON ping a JSON pong with its own `ts`."""
    control = parse_text_ping(text)
    assert isinstance(control, TextPing)
    assert control.answer.text == answer
    assert control.answer.size == len(answer)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "p",
        "ping ",
        "PING",
        "pong\n",
        "pings",
        "{",
        "{}",
        '{"type"',
        '{"type":"chat"}',
        '{"type":"ping","text":"hi"}',
        '{"type":"pong","ts":1,"x":1}',
        '{"type":["ping"]}',
        '{"type":null}',
        '{"ts":1}',
        '["type","ping"]',
        '"ping"',
        ' {"type":"ping"}',
        '{"type":"ping","ts":NaN}',
        '{"x":"\\"type\\""}',
        '{"type":"ping","ts":"' + "x" * MAX_CONTROL_CHARS + '"}',
    ],
)
def test_inexact_control_text_is_application_data(text: str) -> None:
    """Text that is not an exact match is application data."""
    assert parse_text_ping(text) is None


def test_control_frame_of_64_characters_is_recognised() -> None:
    """The limit applies to the length, and is inclusive: 64 characters."""
    fits = '{"type":"ping","ts":"' + "x" * (MAX_CONTROL_CHARS - 23) + '"}'
    assert len(fits) == MAX_CONTROL_CHARS
    assert isinstance(parse_text_ping(fits), TextPing)
    assert parse_text_ping(fits + " ") is None


def test_ping_of_server_is_recognised() -> None:
    """The server's ping is recognised by a peer with the same rules, and has its true size."""
    assert PING.text is not None
    assert isinstance(parse_text_ping(PING.text), TextPing)
    assert PING.size == len(PING.text)


def _is_control(text: str) -> bool:
    """Return what the rule of the protocol says, in a slow implementation."""
    if text in ("ping", "pong"):
        return True
    if len(text) > MAX_CONTROL_CHARS or not text.startswith("{"):
        return False
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return isinstance(value, dict) and value.get("type") in ("ping", "pong") and set(value) <= {"type", "ts"}


_VALUES = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.just("ping") | st.just("pong")
_OBJECTS = st.dictionaries(st.sampled_from(["type", "ts", "x"]), _VALUES, max_size=3)


@given(st.text() | st.text(alphabet='pingo{}":typets,1 \ud800') | _OBJECTS.map(json.dumps))
@example('{"type":"ping","ts":' + "[" * 40)
@example('{"type":"ping","ts":"\\ud800"}')
@example('{"type":"ping","ts":"\ud800"}')
@example('{"type":"ping","ts":1e999}')
@example('{"type":"ping","ts":' + "9" * 40 + "}")
@example("{" + '"type"' + "\x00")
def test_parsing_control_text_never_raises(text: str) -> None:
    """Any text is a ping, a pong or application data."""
    control = parse_text_ping(text)
    assert control is None or isinstance(control, (TextPing, TextPong))


@given(st.text(max_size=80) | _OBJECTS.map(json.dumps))
def test_quick_check_matches_protocol_rule(text: str) -> None:
    """The quick check agrees with the rule of the protocol."""
    assert (parse_text_ping(text) is not None) == _is_control(text)


@given(st.integers(-(10**30), 10**30) | st.text(max_size=8))
def test_pong_returns_timestamp_of_ping(ts: Any) -> None:
    """A pong has exactly the `ts` of its ping."""
    frame = encode({"type": "ping", "ts": ts})
    control = parse_text_ping(frame.text or "")
    if control is None:
        assert frame.text is None or len(frame.text) > MAX_CONTROL_CHARS
    else:
        assert isinstance(control, TextPing)
        assert json.loads(control.answer.text or "") == {"type": "pong", "ts": ts}
