"""Tests of valid names."""

from __future__ import annotations

import pytest

from fastapi_ws_stabilizer.wire.identifiers import MAX_NAME_CHARS, is_name


@pytest.mark.parametrize(
    "name",
    [
        "ann",
        "ann@example.com",
        "a.b.c",
        "x" * 200,
        "x" * MAX_NAME_CHARS,
        "🦊",
        "👨\u200d👩\u200d👧",
        "日本\u3000語",
        " ",
        "",
    ],
)
def test_printable_text_of_any_script_is_valid_name(name: str) -> None:
    """Addresses, emoji, including those of several characters, spaces and all scripts are valid."""
    assert is_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "x" * (MAX_NAME_CHARS + 1),
        "a\x00",
        "\r\n[ERROR] fake",
        "\x1b[2J",
        "a\x7f",
        "a\x9b31m",
        "a\u2028b",
        "\u2029",
        "\ud800",
    ],
    ids=ascii,
)
def test_long_or_control_text_is_invalid_name(name: str) -> None:
    """Control characters, line separators and surrogates are invalid."""
    assert not is_name(name)
