"""Tests that only a valid token is accepted."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastapi_ws_stabilizer.auth.signed_tokens import RECONNECT_TOKEN
from tests.fuzz.targets.tokens import tokens

pytestmark = pytest.mark.generated

_TEXTS = st.text(max_size=40) | st.text(st.sampled_from("AZaz09-_=+/."), max_size=120).map(
    RECONNECT_TOKEN.prefix.__add__
)
_CHANGES = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 160), st.integers(0, 255)), max_size=4).map(
    lambda changes: b"".join(bytes([how]) + at.to_bytes(2, "big") + bytes([new]) for how, at, new in changes)
)


def _bytes_of(text: str) -> bytes:
    return text.replace("\0", "").encode("utf-8", "surrogatepass")


@settings(max_examples=200)
@given(_TEXTS, _TEXTS, _CHANGES)
def test_only_valid_token_is_accepted_once(client_id: str, text: str, changes: bytes) -> None:
    """No text, no other spelling or alteration of a valid token, and no token a second time is accepted."""
    tokens(b"\0".join([_bytes_of(client_id), _bytes_of(text), changes]))
