"""Tests of the table of close policies."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastapi_ws_stabilizer.close_codes import (
    CLOSE_POLICIES,
    MAX_REASON_BYTES,
    CloseInfo,
    DisconnectReason,
    check_close_code,
    local_close,
    remote_close,
    truncate_reason,
)


@pytest.mark.parametrize("code", [1000, 1001, 1002, 1003, 1007, 1011, 1012, 1013, 1014, 3000, 3999, 4000, 4408, 4999])
def test_sendable_close_code_is_returned(code: int) -> None:
    """A code of RFC 6455 section 7.4 that an endpoint may send passes the check."""
    assert check_close_code(code) == code


@pytest.mark.parametrize("code", [0, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000, -1, True, "1000", 1000.0, None])
def test_unsendable_close_code_raises(code: object) -> None:
    """A code that is not allowed in a close frame is a `ValueError` that names the allowed ones."""
    with pytest.raises(ValueError, match="4000 to 4999"):
        check_close_code(code)  # type: ignore[arg-type]


@given(st.text(max_size=400))
def test_truncated_reason_fits_into_close_frame(text: str) -> None:
    """A truncated reason has at most 123 bytes of UTF-8, is a prefix, and is cut at a character."""
    whole = text.encode("utf-8", "replace")
    cut = truncate_reason(text).encode("utf-8")
    assert len(cut) <= MAX_REASON_BYTES
    assert whole.startswith(cut)
    assert len(cut) > MAX_REASON_BYTES - 4 or cut == whole


@given(st.text(alphabet=st.characters(), max_size=200).map(lambda text: text + "\ud800"))
def test_half_surrogate_in_reason_is_replaced(text: str) -> None:
    """A reason that UTF-8 cannot encode is sent with a replacement character."""
    assert len(truncate_reason(text).encode("utf-8")) <= MAX_REASON_BYTES


@pytest.mark.parametrize("reason", DisconnectReason)
def test_every_cause_has_policy_with_sendable_code(reason: DisconnectReason) -> None:
    """Every cause is in the table, with a valid close code where one can be sent."""
    policy = CLOSE_POLICIES[reason]
    if reason is DisconnectReason.NETWORK_LOST:
        assert policy.code == 1006
    else:
        assert check_close_code(policy.code) == policy.code
    assert len(policy.reason.encode()) <= MAX_REASON_BYTES


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        (DisconnectReason.COMPLETED, 1000),
        (DisconnectReason.POLICY, 1008),
        (DisconnectReason.MESSAGE_TOO_BIG, 1009),
        (DisconnectReason.ERROR, 1011),
        (DisconnectReason.SERVER_SHUTDOWN, 1012),
        (DisconnectReason.HEARTBEAT_TIMEOUT, 4408),
        (DisconnectReason.REPLACED, 4409),
        (DisconnectReason.SLOW_CONSUMER, 4507),
    ],
)
def test_close_codes_match_wire_protocol(reason: DisconnectReason, code: int) -> None:
    """Each cause has its own close code, and only a normal close has 1000."""
    assert local_close(reason).code == code


def test_local_close_defaults_to_code_and_reason_of_policy() -> None:
    """Without arguments the code and the reason come from the table."""
    made = local_close(DisconnectReason.HEARTBEAT_TIMEOUT)
    assert made == CloseInfo(DisconnectReason.HEARTBEAT_TIMEOUT, 4408, "heartbeat timeout", by_peer=False)
    assert made.policy is CLOSE_POLICIES[DisconnectReason.HEARTBEAT_TIMEOUT]


def test_local_close_uses_code_and_reason_of_caller() -> None:
    """The caller's code and reason override the table; the reason is truncated."""
    assert local_close(DisconnectReason.POLICY, code=4401, reason="who?") == CloseInfo(
        DisconnectReason.POLICY, 4401, "who?"
    )
    assert local_close(DisconnectReason.POLICY, reason="").reason == ""
    assert local_close(DisconnectReason.POLICY, reason="x" * 200).reason == "x" * 123


def test_local_close_with_unsendable_code_raises() -> None:
    """A local close cannot carry a code that is not allowed in a close frame."""
    with pytest.raises(ValueError, match="1006"):
        local_close(DisconnectReason.APPLICATION, code=1006)


@pytest.mark.parametrize(
    ("code", "close_frame", "reason", "seen_code"),
    [
        (1000, True, DisconnectReason.CLIENT_CLOSE, 1000),
        (1001, True, DisconnectReason.CLIENT_CLOSE, 1001),
        (1005, True, DisconnectReason.CLIENT_CLOSE, 1005),
        (4000, True, DisconnectReason.CLIENT_CLOSE, 4000),
        (1006, True, DisconnectReason.CLIENT_CLOSE, 1005),
        (1005, False, DisconnectReason.NETWORK_LOST, 1006),
        (1006, False, DisconnectReason.NETWORK_LOST, 1006),
        (1009, False, DisconnectReason.MESSAGE_TOO_BIG, 1009),
        (1012, False, DisconnectReason.SERVER_SHUTDOWN, 1012),
    ],
)
def test_disconnect_event_distinguishes_remote_close_and_loss(
    code: int, close_frame: bool, reason: DisconnectReason, seen_code: int
) -> None:
    """A close frame is distinguished from a lost connection, and the server's own closes from the client's."""
    made = remote_close(code, None, close_frame=close_frame)
    assert made == CloseInfo(reason, seen_code, "", by_peer=True)


def test_remote_close_has_reason_of_peer() -> None:
    """The reason of the client's close frame is in the close info."""
    assert remote_close(4000, "see you", close_frame=True).reason == "see you"
