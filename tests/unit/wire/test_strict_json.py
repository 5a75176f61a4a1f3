"""Tests of parsing JSON from a peer."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter
from pydantic_core import from_json

from fastapi_ws_stabilizer.wire.strict_json import (
    MAX_DEPTH,
    MAX_FRAME_DEPTH,
    MAX_NUMBER,
    MAX_SENT_DEPTH,
    InvalidJsonError,
    check_json,
    check_sent,
    read_json,
)

MIB = 1 << 20


class Anything(BaseModel):
    """Model that accepts any value."""

    type: str = ""
    x: Any = None


def lists(depth: int) -> str:
    """Return that many nested lists."""
    return "[" * depth + "]" * depth


def objects(depth: int) -> str:
    """Return that many nested objects."""
    return '{"":' * (depth - 1) + "{}" + "}" * (depth - 1)


@pytest.mark.parametrize("nested", [lists, objects])
@pytest.mark.parametrize("read", [read_json, check_json])
def test_received_json_depth_is_limited(nested: Any, read: Any) -> None:
    """A text with `MAX_DEPTH` levels is parsed; one more level is rejected, and the error gives the reason."""
    read(nested(MAX_DEPTH))
    with pytest.raises(InvalidJsonError, match=f"nested deeper than {MAX_DEPTH} levels"):
        read(nested(MAX_DEPTH + 1))


@pytest.mark.parametrize("nested", [lists, objects])
@pytest.mark.parametrize("around", ["%s", '["]][[{",%s]', "[[],%s,{}]"])
def test_sent_json_depth_is_limited(nested: Any, around: str) -> None:
    """What the server sends may be nested up to `MAX_SENT_DEPTH` levels, whatever is beside the deepest one."""
    outer = 0 if around == "%s" else 1
    check_sent((around % nested(MAX_SENT_DEPTH - outer)).encode())
    with pytest.raises(InvalidJsonError, match=f"nested deeper than {MAX_SENT_DEPTH} levels"):
        check_sent((around % nested(MAX_SENT_DEPTH - outer + 1)).encode())


def test_sent_json_may_be_deeper_than_received_json() -> None:
    """An application can wrap a client's message in objects of its own, and each client can read the frame."""
    assert MAX_DEPTH < MAX_SENT_DEPTH < MAX_FRAME_DEPTH
    read_json(lists(MAX_FRAME_DEPTH), MAX_FRAME_DEPTH)


@pytest.mark.parametrize(
    "value", [10**400, -(10**309), [{"x": 2**1024}], "Infinity is a word", "NaN", 1.7e308, 2**1023]
)
def test_sent_number_above_largest_double_raises(value: Any) -> None:
    """A number beyond the largest double cannot be sent; words and the largest doubles can."""
    text = json.dumps(value).encode()
    if isinstance(value, (str, float)) or value == 2**1023:
        check_sent(text)
    else:
        with pytest.raises(InvalidJsonError, match="it contains a number beyond"):
            check_sent(text)


def test_sent_nan_and_infinity_raise() -> None:
    """A NaN or an infinity, as a pydantic model may write it, cannot be sent."""
    for text in (b"[NaN]", b'{"x":Infinity}', b"-Infinity"):
        with pytest.raises(InvalidJsonError):
            check_sent(text)


@pytest.mark.parametrize("depth", [199, 200, 201, 202, 5000, MIB])
@pytest.mark.parametrize("nested", [lists, objects])
def test_extreme_nesting_raises_invalid_json_error(nested: Any, depth: int) -> None:
    """Text of any depth is rejected as invalid JSON, and the parser stops at its own limit."""
    with pytest.raises(InvalidJsonError):
        read_json(nested(depth))
    with pytest.raises(InvalidJsonError):
        read_json(nested(depth)[: depth // 2])


def test_brackets_in_strings_are_not_nesting() -> None:
    """Brackets in strings, and brackets side by side, do not count as nesting."""
    assert read_json(json.dumps("[" * 1000)) == "[" * 1000
    assert read_json(json.dumps([[]] * 1000)) == [[]] * 1000
    check_json(json.dumps({"x": "{[" * 1000, "y": [{}] * 100}))


HUGE = [
    "1e999",
    "-1e999",
    "1E999",
    "1e+999",
    "1E+0999",
    "1.5e309",
    "1e309",
    "9" * 309,
    "-" + "9" * 309,
    "9" * 309 + ".5",
    "9" * 300 + "e9",
    "9" * 300 + "E+9",
    "9" * 4000,
    "1" + "0" * 250 + "e99",
]


@pytest.mark.parametrize("number", HUGE, ids=lambda number: f"{number[:8]}, {len(number)} characters")
@pytest.mark.parametrize("around", ["%s", "[%s]", '{"x":[1,{"y":%s}]}', '{"long":"' + "x" * 500 + '","x":%s}'])
def test_received_number_above_largest_double_is_rejected(number: str, around: str) -> None:
    """No handler gets an infinity, or an integer that becomes one as a float."""
    text = around % number
    for read in (read_json, check_json):
        with pytest.raises(InvalidJsonError, match=r"beyond 1\.8e\+308"):
            read(text)
        with pytest.raises(InvalidJsonError):
            read(text.encode())


def many(value: str, count: int) -> str:
    """Return that many copies of a value, as in a list."""
    return ",".join([value] * count)


AROUND = {
    "few values": '{"text":"' + "x" * 400 + '","x":[{"y":VALUE}]}',
    "first of many": '{"x":VALUE,"many":[' + many("{}", 300) + "]}",
    "last of many": "[" + many('{"a":1,"b":"see"}', 300) + ',{"y":VALUE}]',
    "many texts": "[" + many('"hello to each client"', 300) + ",VALUE]",
    "many numbers": "[" + many("1234567", 3000) + ",VALUE]",
    "alone": "VALUE",
    "spread": "[ VALUE , " + many("1", 300) + " ]",
    "after brackets in texts": '["' + "[{" * 200 + '",VALUE]',
    "uuids": "[" + many('"7e123456-0e00-1e99-8e99-000000000000"', 100) + ",VALUE]",
}
"""Texts of each kind that is parsed differently."""


@pytest.mark.parametrize("around", AROUND.values(), ids=list(AROUND))
@pytest.mark.parametrize(
    "value", [*HUGE, "[" * 65 + "]" * 65, '{"a":' * 65 + "1" + "}" * 65, '[{"a":' * 33 + "[]" + "}]" * 33]
)
def test_limits_apply_at_every_position(around: str, value: str) -> None:
    """The limits apply in large and small texts, among many values and among few."""
    text = around.replace("VALUE", value)
    for raw in (text, text.encode()):
        with pytest.raises(InvalidJsonError):
            read_json(raw)
        with pytest.raises(InvalidJsonError):
            check_json(raw)


@pytest.mark.parametrize("around", AROUND.values(), ids=list(AROUND))
@pytest.mark.parametrize("value", ["1e300", "1" * 308, "[" * 60 + "{}" + "]" * 60])
def test_values_within_limits_are_accepted_at_every_position(around: str, value: str) -> None:
    """The same texts are parsed where their values are just within the limits."""
    text = around.replace("VALUE", value)
    assert read_json(text) == read_json(text.encode()) == json.loads(text)
    check_json(text)


@pytest.mark.alone
@pytest.mark.parametrize("text", ["e" * MIB, "Ee1" * (MIB // 3), "1e" * (MIB // 2), "1234567890" * (MIB // 10)])
def test_long_string_is_not_scanned_for_numbers(text: str) -> None:
    """The search for huge numbers takes no time where there are few values, whatever their texts are."""
    text = json.dumps({"type": "note", "text": text})

    def seconds(read: Any) -> float:
        started = time.perf_counter()
        read(text)
        return time.perf_counter() - started

    assert min(seconds(read_json) for _ in range(20)) < 4 * min(seconds(from_json) for _ in range(20)) + 1e-4


@pytest.mark.parametrize("number", ["1.7976931348623157e308", "1e300", "1E+21", "1e-999", "9" * 308, "0." + "1" * 5000])
def test_large_and_tiny_doubles_are_accepted(number: str) -> None:
    """Large numbers, and those that round to zero, are accepted."""
    assert read_json(f"[{number}]") == [json.loads(number)]
    check_json(number)


@pytest.mark.alone
@pytest.mark.parametrize("digits", [5000, 100_000, MIB])
def test_mebibyte_of_digits_is_rejected_at_once(digits: int) -> None:
    """A number of a mebibyte is rejected at once, before the parser computes it."""
    started = time.perf_counter()
    with pytest.raises(InvalidJsonError):
        read_json("1" * digits)
    assert time.perf_counter() - started < 0.5  # Python's own int() takes a minute


@given(st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**400), 10**400))
def test_numbers_are_accepted_up_to_largest_double(number: float) -> None:
    """Exactly the numbers up to the largest double are accepted, in any notation."""
    text = f'{{"before":"{"x" * 200}","n":{json.dumps(number)}}}'
    if -MAX_NUMBER <= number <= MAX_NUMBER:
        assert read_json(text)["n"] == number
    else:
        with pytest.raises(InvalidJsonError):
            read_json(text)


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", '{"x":-Infinity}', '{"x":NaN}'])
@pytest.mark.parametrize("read", [read_json, check_json])
def test_nan_and_infinity_are_rejected(text: str, read: Any) -> None:
    """NaN and infinities are rejected, also where pydantic would accept them."""
    with pytest.raises(InvalidJsonError, match="not JSON"):
        read(text)
    with pytest.raises(InvalidJsonError):
        read(text.encode())


@pytest.mark.parametrize("text", ['"NaN"', '{"x":"Infinity, and NaN"}', '{"NaN":1}'])
def test_string_may_contain_nan(text: str) -> None:
    """Only numbers are checked."""
    assert read_json(text) == json.loads(text)
    check_json(text)


@pytest.mark.parametrize("text", ['"\\ud800"', '{"\\udc00":1}', '"\\ud800\\u0041"', '"\ud800"'])
def test_half_surrogate_pair_is_rejected(text: str) -> None:
    """No handler gets a text that it could not send back."""
    with pytest.raises(InvalidJsonError, match="not JSON"):
        read_json(text)
    with pytest.raises(ValueError):  # noqa: PT011 (pydantic's own or ours)
        TypeAdapter(Anything).validate_json(f'{{"x":{text}}}')


def test_whole_surrogate_pair_is_one_character() -> None:
    """Both halves of a pair are one character, in any notation."""
    assert read_json('"\\ud83e\\udd8a"') == read_json('"🦊"') == "🦊"


@pytest.mark.parametrize("more", [0, 30])
def test_last_duplicate_member_wins_in_every_parser(more: int) -> None:
    """The router, pydantic and Python's `json` use the same member, in small objects and in large ones."""
    text = '{"type":"a",' + "".join(f'"k{number}":{number},' for number in range(more)) + '"type":"b"}'
    assert read_json(text)["type"] == "b"
    assert TypeAdapter(Anything).validate_json(text).type == "b"
    assert TypeAdapter(dict[str, Any]).validate_json(text)["type"] == "b"
    assert json.loads(text)["type"] == "b"


@pytest.mark.parametrize("raw", [b"\xff", b'"\xed\xa0\x80"', b'"\xc0\x80"', b"", b"\x00"])
def test_invalid_utf8_is_rejected(raw: bytes) -> None:
    """Bytes that are not UTF-8 are rejected, including overlong and surrogate encodings."""
    with pytest.raises(InvalidJsonError, match="not JSON"):
        read_json(raw)


@pytest.mark.parametrize("text", ["", "{", "nonsense", '"\ud800"', "NaN", lists(70), "1e999", "{'a':1}", "[1,]"])
def test_json_error_names_no_python_internals(text: str) -> None:
    """No type, module or function of Python is in an error that a client gets."""
    with pytest.raises(InvalidJsonError) as caught:
        read_json(text)
    text = str(caught.value)
    assert not any(word in text for word in ("bytearray", "pydantic", "codec", "Error", "<"))
    assert len(text) < 200


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(),
        lambda v: st.lists(v) | st.dictionaries(st.text(), v),
    )
)
def test_ordinary_values_match_json_module(value: Any) -> None:
    """Values within the limits are parsed as by `json`, from text and from bytes."""
    text = json.dumps(value)
    assert read_json(text) == read_json(text.encode()) == json.loads(text)
    check_json(text)


def test_checked_text_contains_no_infinity() -> None:
    """A checked text gives pydantic only finite numbers."""
    check_json(text := '{"x":1.5e300}')
    assert math.isfinite(TypeAdapter(Anything).validate_json(text).x)
