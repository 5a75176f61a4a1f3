"""Tests that no bytes break the protocol class, with a direct transport and without one."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz import strategies
from tests.fuzz.targets.served import Circumstances, handshake, outcome_of, same_in_pieces

pytestmark = pytest.mark.generated

_CIRCUMSTANCES = st.builds(
    Circumstances,
    **dict.fromkeys(["linked", "deflates", "numbered", "slow", "early", "stalls", "leaves"], st.booleans()),
)
_HOW = st.integers(1, 255)


@settings(max_examples=300)
@given(_CIRCUMSTANCES, strategies.mutated(strategies.any_frames()) | st.binary(max_size=100), _HOW)
def test_any_bytes_after_handshake_are_read_or_close(circumstances: Circumstances, data: bytes, how: int) -> None:
    """Nothing is raised, nothing grows, nothing is written after the close, and pieces change nothing."""
    same_in_pieces(circumstances, data, how)


@settings(max_examples=200)
@given(_CIRCUMSTANCES, strategies.conversations(), st.integers(0, 255))
def test_valid_frames_are_delivered_in_any_pieces(
    circumstances: Circumstances, sent: tuple[list[str | bytes], bytes], how: int
) -> None:
    """Every message arrives once and in order, however its frames are cut, and however slow the application is."""
    messages, stream = sent
    outcome = outcome_of(replace(circumstances, numbered=False, leaves=False), stream, how)
    assert outcome.messages == messages
    assert not outcome.ended_by_us


@settings(max_examples=200)
@given(_CIRCUMSTANCES, st.just(b"") | st.binary(max_size=20), st.integers(0, 255), st.data())
def test_any_handshake_bytes_are_answered_or_close(
    circumstances: Circumstances, behind: bytes, how: int, data: st.DataObject
) -> None:
    """An invalid handshake is rejected in HTTP, or waits for its rest; nothing is raised."""
    request = data.draw(strategies.mutated(st.just(circumstances.request)) | st.binary(max_size=60))
    switches = circumstances.linked | circumstances.early << 4
    handshake(bytes([switches, how]) + request + behind)
