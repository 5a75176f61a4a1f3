"""Tests that any options make a config or an error."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.targets.configs import NAMES, PRESETS, makes_a_config, reads_an_environment

pytestmark = pytest.mark.generated

_NAMES = st.sampled_from(NAMES) | st.text(max_size=12)
_ANYTHING = st.sampled_from(PRESETS) | st.text(max_size=20) | st.integers() | st.floats() | st.binary(max_size=20)


@settings(max_examples=150)
@given(st.dictionaries(_NAMES, _ANYTHING | st.lists(_ANYTHING, max_size=3), max_size=5))
def test_any_options_create_config_or_error(options: dict[str, object]) -> None:
    """Any options make a config that a manager accepts, or raise `ValidationError`."""
    makes_a_config(options)


_TEXTS = (
    st.sampled_from(["", "none", "1", "0", "-1", "1e400", "nan", "true", "9" * 5000, "a,b", " , ", "PT1H"]) | st.text()
)


_OF_SECONDS = st.sampled_from(["reconnect_token_ttl", "session_ttl", "drain_window"])


@settings(max_examples=150)
@given(st.dictionaries((_NAMES | _OF_SECONDS).map(lambda name: f"WS_{name.upper()}"), _TEXTS, max_size=5))
def test_any_environment_creates_config_or_error(environ: dict[str, str]) -> None:
    """Any environment makes a config that a manager accepts, or raises `ValidationError`."""
    reads_an_environment(environ)
