"""Tests of when a client reconnects, and when it does not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastapi_ws_stabilizer.client import backoff as backoff_module
from fastapi_ws_stabilizer.client.backoff import Backoff, ReconnectAction, action_for

AGAIN = [1000, 1001, 1005, 1006, 1011, 1012, 1013, 1014, 1015, 4408, 4409, 4429, 4500, 4503, 4507]
AGAIN_OF_APPLICATIONS = [3001, 3002, 3004, 3999, 4001, 4100, 4350, 4399, 4501, 4600, 4999]
FINAL = [1002, 1003, 1007, 1009, 1010, 3003, 4400, 4403, 4404, 4406, 4410]
FINAL_OF_APPLICATIONS = [4402, 4405, 4407, 4411, 4413, 4418, 4428, 4430, 4499]
SLOW = [1012, 1013, 1014, 4429, 4503]


@pytest.mark.parametrize("code", AGAIN + AGAIN_OF_APPLICATIONS)
def test_unknown_close_code_reconnects_with_backoff(code: int) -> None:
    """A close code that does not concern the client leads to a reconnect with backoff."""
    assert action_for(code) is ReconnectAction.RETRY


@pytest.mark.parametrize("code", FINAL + FINAL_OF_APPLICATIONS)
def test_terminal_code_stops_reconnecting(code: int) -> None:
    """After a close code that says that the client is at fault, it does not reconnect."""
    assert action_for(code) is ReconnectAction.STOP


@pytest.mark.parametrize("code", [1008, 3000, 4401])
def test_credential_code_requests_new_credential(code: int) -> None:
    """A rejected credential is renewed once."""
    assert action_for(code) is ReconnectAction.REAUTHENTICATE


@pytest.mark.parametrize("code", [4000, 4412])
def test_detach_and_resync_codes_reconnect_at_once(code: int) -> None:
    """Codes for detaching and resynchronising are not failures of the server, so they cause no backoff."""
    assert action_for(code) is ReconnectAction.RETRY_NOW


@given(st.integers(1000, 4999))
def test_every_close_code_has_reconnect_action(code: int) -> None:
    """Every close code has an action of the client."""
    assert action_for(code) in ReconnectAction


def delays(monkeypatch: pytest.MonkeyPatch, dice: float, codes: list[int], **options: float) -> list[float]:
    """Return the delays after some failures, with dice that always show the same number."""
    monkeypatch.setattr(backoff_module.random, "uniform", lambda low, high: low + dice * (high - low))
    backoff = Backoff(**options)
    return [round(backoff.delay(code, ""), 6) for code in codes]


def test_backoff_window_doubles_up_to_maximum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Delays are 200 ms plus a random part of a window that doubles with each failure, up to 30 s."""
    assert delays(monkeypatch, 1.0, [1006] * 8) == [1.2, 2.2, 4.2, 8.2, 16.2, 30.2, 30.2, 30.2]


def test_backoff_has_full_jitter_above_minimum(monkeypatch: pytest.MonkeyPatch) -> None:
    """The delay may be 200 ms plus any part of the window, including none of it."""
    assert delays(monkeypatch, 0.0, [1006] * 5) == [0.2] * 5
    assert delays(monkeypatch, 0.5, [1006] * 3) == [0.7, 1.2, 2.2]


@pytest.mark.parametrize("code", SLOW)
def test_shared_shutdown_code_widens_first_window(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """When the server is shutting down, the first window is five times as wide."""
    assert delays(monkeypatch, 1.0, [code, code, code, code]) == [5.2, 10.2, 20.2, 30.2]


def test_backoff_limits_are_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """The minimum delay, the first window and the largest window are options."""
    assert delays(monkeypatch, 1.0, [1006] * 4, base=0.5, max_delay=3.0, min_delay=0.0) == [0.5, 1.0, 2.0, 3.0]


@given(st.sampled_from(AGAIN), st.integers(0, 10_000))
def test_delay_is_always_within_bounds(code: int, attempt: int) -> None:
    """After any number of failures the delay is between 200 ms and 30.2 s."""
    backoff = Backoff(attempt=attempt)
    assert 0.2 <= backoff.delay(code, "") <= 30.2
    assert backoff.attempt == attempt + 1


def test_stable_connection_resets_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a reset the window starts again at its first size."""
    monkeypatch.setattr(backoff_module.random, "uniform", lambda low, high: high)
    backoff = Backoff(attempt=7)
    backoff.reset()
    assert backoff.delay(1006, "") == 1.2


@pytest.mark.parametrize(
    ("reason", "delay"),
    [
        ("retry=3471", 3.471),
        ("draining; retry=3471", 3.471),
        ("retry=0", 0.0),
        ("try later (retry=250)", 0.25),
        ("retry=9999999", 300.0),
    ],
)
def test_retry_hint_is_minimum_delay(reason: str, delay: float) -> None:
    """A hint in the reason is the minimum delay, up to 300 s."""
    for _ in range(20):
        assert delay <= Backoff().delay(4503, reason) <= delay * 1.1 + 0.2


def test_retry_hint_has_jitter() -> None:
    """Clients with the same hint reconnect spread over a tenth of it plus 200 ms."""
    found = [Backoff().delay(4503, "retry=10000") for _ in range(500)]
    assert min(found) < 10.2
    assert max(found) > 11.0
    assert len(set(found)) > 400


def test_retry_hint_of_4429_is_always_obeyed() -> None:
    """After 4429 the client always waits as long as the hint says, and never reconnects without a pause."""
    backoff = Backoff()
    assert all(2.0 <= backoff.delay(4429, "too many messages; retry=2000") <= 2.4 for _ in range(20))
    assert min(backoff.delay(4429, "retry=0") for _ in range(20)) >= 0.2


@pytest.mark.parametrize("reason", ["", "retry", "retry=", "retry=-5", "retry=soon", "noretry=100", "retry=99999999"])
def test_invalid_retry_hint_is_ignored(reason: str) -> None:
    """Only digits after `retry=` are a hint."""
    assert Backoff().delay(1006, reason) >= 0.2


def test_retry_hint_is_obeyed_three_times() -> None:
    """A server that always sends `retry=0` is not dialled in an endless loop."""
    backoff = Backoff()
    assert max(backoff.delay(4503, "retry=0") for _ in range(3)) <= 0.2
    assert backoff.delay(4503, "retry=0") >= 0.2
