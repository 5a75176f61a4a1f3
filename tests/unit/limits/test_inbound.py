"""Tests of rate limits for inbound messages, and of disconnects after too many rejections."""

from __future__ import annotations

import pytest

from fastapi_ws_stabilizer.client.send_buffer import MAX_WINDOW
from fastapi_ws_stabilizer.limits.inbound import InboundRateLimiter, KeyedRateLimiter, RateExceeded, rate_limiter


def flood(
    limit: KeyedRateLimiter, client_id: str, rate: float, seconds: float, cost: float = 1.0
) -> list[RateExceeded | None]:
    """Return the answers to a client that sends at a constant rate."""
    return [limit.take(client_id, f"tab of {client_id}", cost, number / rate) for number in range(int(seconds * rate))]


def rejections(answers: list[RateExceeded | None]) -> list[RateExceeded]:
    """Return the rejections among the answers."""
    return [answer for answer in answers if answer is not None]


def test_messages_at_rate_are_never_rejected() -> None:
    """A client that sends at its rate is never rejected."""
    assert rejections(flood(KeyedRateLimiter(10, 10), "ann", 10, 60)) == []


def test_burst_is_allowed_before_wait() -> None:
    """A quiet client may send a burst at once, and the next message has to wait for a refill."""
    limit = KeyedRateLimiter(10, 5)
    assert [limit.take("ann", "tab of ann", 1.0, 7.0) for _ in range(5)] == [None] * 5
    assert limit.take("ann", "tab of ann", 1.0, 7.0) == (pytest.approx(0.1), False, "max_rate", None)


def test_double_rate_is_rejected_without_disconnect() -> None:
    """At twice the rate half of the messages are rejected, but no rejection disconnects."""
    rejected = rejections(flood(KeyedRateLimiter(10, 10), "ann", 20, 120))
    assert len(rejected) == pytest.approx(1200, abs=20)
    assert not any(excess.disconnect for excess in rejected)


def test_flood_disconnects_after_burst_of_rejections() -> None:
    """At ten times the rate a burst passes, about a burst is rejected, and the next rejection disconnects."""
    answers = flood(KeyedRateLimiter(10, 10), "ann", 100, 1)
    first = next(number for number, answer in enumerate(answers) if answer is not None)
    disconnected_at = next(number for number, answer in enumerate(answers) if answer is not None and answer.disconnect)
    assert first == pytest.approx(11, abs=1)
    assert disconnected_at == pytest.approx(23, abs=3)
    assert all(excess.retry_after > 0 for excess in rejections(answers))


def test_in_flight_messages_after_rejection_do_not_disconnect() -> None:
    """MAX_WINDOW messages in flight after a rejection do not disconnect, but many more do."""
    traffic = InboundRateLimiter(message_rate=10)
    while traffic.take("ann", "tab of ann", 10, 0.0) is None:
        pass
    assert [traffic.count_ignored("tab of ann", 10, 0.0) for _ in range(MAX_WINDOW)] == [None] * MAX_WINDOW
    excess = traffic.take("ann", "tab of ann", 10, 0.0)
    assert excess is not None
    assert not excess.disconnect
    assert any(traffic.count_ignored("tab of ann", 10, 0.0) for _ in range(20))


@pytest.mark.parametrize("size", [1.0, 4.0])
def test_early_rejection_with_burst_of_one_does_not_disconnect(size: float) -> None:
    """One rejection for each accepted message does not disconnect, even if it comes slightly early."""
    limit = KeyedRateLimiter(size, size)
    answers = [limit.take("ann", "tab of ann", size, at) for at in (0.0, 0.05, 1.0, 1.049, 2.0, 2.048)]
    assert [None if answer is None else answer.disconnect for answer in answers] == [None, False] * 3


def test_message_after_retry_after_is_allowed() -> None:
    """A message that is sent after `retry_after` is allowed."""
    limit = KeyedRateLimiter(3, 1)
    assert limit.take("ann", "tab of ann", 1.0, 0.0) is None
    excess = limit.take("ann", "tab of ann", 1.0, 0.1)
    assert excess is not None
    assert limit.take("ann", "tab of ann", 1.0, 0.1 + excess.retry_after) is None


def test_disconnected_connection_is_limited_until_refill() -> None:
    """Only time refills the buckets of a disconnected connection."""
    limit = KeyedRateLimiter(10, 10)
    for _ in range(20):
        limit.take("ann", "tab of ann", 1.0, 0.0)
    for _ in range(3):
        again = limit.take("ann", "tab of ann", 1.0, 0.01)
        assert again is not None
        assert again.disconnect
    assert limit.take("ann", "tab of ann", 1.0, 2.0) is None


def test_new_connection_of_disconnected_client_is_limited() -> None:
    """A new connection shares the empty bucket of its client, but is rejected several times before its disconnect."""
    limit = KeyedRateLimiter(10, 10)
    for _ in range(20):
        limit.take("ann", "first", 1.0, 0.0)
    again = rejections([limit.take("ann", "second", 1.0, 0.01) for _ in range(11)])
    assert [excess.disconnect for excess in again] == [False] * 10 + [True]


def test_flood_of_other_connection_does_not_disconnect() -> None:
    """A connection within its rate is rejected for a flood of another connection, but not disconnected."""
    limit = KeyedRateLimiter(10, 10)
    rejected = []
    for tick in range(600):  # 60 s
        for _ in range(20):
            limit.take("ann", "flood", 1.0, tick / 10)
        rejected += rejections([limit.take("ann", "quiet", 1.0, tick / 10)])
    assert len(rejected) > 500
    assert not any(excess.disconnect for excess in rejected)


@pytest.mark.parametrize(("rate", "burst", "delay"), [(10, 10, 1.0), (10, 50, 5.0), (1, 1000, 60.0), (0.01, 1, 100.0)])
def test_retry_after_of_disconnect_covers_bucket_refill(rate: float, burst: float, delay: float) -> None:
    """`retry_after` of a disconnect is the time of a refill, at most 60 s unless one message needs longer."""
    limit = KeyedRateLimiter(rate, burst)
    excess = next(
        answer
        for answer in (limit.take("ann", "tab of ann", 1.0, 0.0) for _ in range(10_000))
        if answer and answer.disconnect
    )
    assert excess.retry_after == pytest.approx(delay)


def test_each_client_has_its_own_buckets() -> None:
    """Each client has its own buckets."""
    limit = KeyedRateLimiter(10, 10)
    assert rejections(flood(limit, "ann", 1000, 1))
    assert rejections(flood(limit, "bob", 10, 1)) == []


def test_amount_over_burst_counts_as_burst() -> None:
    """An amount above the burst counts as the burst, so that it passes a full bucket."""
    limit = KeyedRateLimiter(10, 100)
    assert limit.take("ann", "tab of ann", 1e9, 0.0) is None
    assert limit.take("ann", "tab of ann", 1.0, 0.0) is not None
    assert limit.take("ann", "tab of ann", 1e9, 10.0) is None


# ── rates and bursts ──


def test_limiter_without_rate_limits_nothing() -> None:
    """Without a rate there is no limiter."""
    assert rate_limiter(None) is None
    assert not InboundRateLimiter().limited


@pytest.mark.parametrize(("rate", "burst"), [(10.0, 10), (0.1, 1), (2.5, 3)])
def test_default_burst_is_one_second_of_messages(rate: float, burst: int) -> None:
    """The default burst is the messages of one second, but at least one."""
    limit = rate_limiter(rate)
    assert limit is not None
    answers = [limit.take("ann", "tab of ann", 1.0, 0.0) for _ in range(burst + 1)]
    assert answers[:-1] == [None] * burst
    assert answers[-1] is not None


def test_burst_without_rate_raises() -> None:
    """A burst without a rate raises and names the missing rate."""
    with pytest.raises(ValueError, match="set the rate too"):
        rate_limiter(None, 5)


@pytest.mark.parametrize(("rate", "burst"), [(0.0, None), (-1.0, None), (float("inf"), None), (1.0, 0), (1.0, -1)])
def test_invalid_rate_or_burst_raises(rate: float, burst: float | None) -> None:
    """A rate or burst that is not finite and positive raises."""
    with pytest.raises(ValueError, match=r"number above zero|burst"):
        rate_limiter(rate, burst)


def test_burst_below_one_raises() -> None:
    """A burst below 1 raises, because each message costs 1."""
    with pytest.raises(ValueError, match="at least 1"):
        rate_limiter(10.0, 0.5)


def test_rate_exceeded_names_option_and_message_type() -> None:
    """A rejection names the option that set the rate, and the message type if it has one."""
    both = InboundRateLimiter(message_rate=2, byte_rate=100)
    by_number = [both.take("ann", "tab of ann", 0, 0.0) for _ in range(3)][-1]
    by_bytes = [both.take("bob", "tab of bob", 100, 0.0) for _ in range(2)][-1]
    limit = rate_limiter(1.0, message_type="search")
    assert limit is not None
    by_type = [limit.take("ann", "tab of ann", 1.0, 0.0) for _ in range(2)][-1]
    found = [(one.option, one.message_type) for one in (by_number, by_bytes, by_type) if one is not None]
    assert found == [("max_message_rate", None), ("max_byte_rate", None), ("max_rate", "search")]


# ── message and byte rates ──


def test_message_and_byte_rates_apply_independently() -> None:
    """The rate that is used up first rejects the message."""
    traffic = InboundRateLimiter(message_rate=10, byte_rate=1000)
    assert [traffic.take("ann", "tab of ann", 1, 0.0) for _ in range(10)] == [None] * 10
    assert traffic.take("ann", "tab of ann", 1, 0.0) is not None
    assert [traffic.take("bob", "tab of bob", 250, 0.0) for _ in range(4)] == [None] * 4
    assert traffic.take("bob", "tab of bob", 250, 0.0) == (pytest.approx(0.25), False, "max_byte_rate", None)


def test_largest_message_passes_full_bucket_at_any_byte_rate() -> None:
    """A message of `max_message_size` passes a full bucket at any byte rate; the next one waits for the refill."""
    traffic = InboundRateLimiter(byte_rate=100, max_message_size=1000)
    assert traffic.take("ann", "tab of ann", 1000, 0.0) is None
    assert traffic.take("ann", "tab of ann", 1, 0.0) == (pytest.approx(0.01), False, "max_byte_rate", None)
    excess = traffic.take("ann", "tab of ann", 1000, 1.0)
    assert excess is not None
    assert excess.retry_after == pytest.approx(9.0)
    assert traffic.take("ann", "tab of ann", 1000, 10.0) is None


def test_empty_message_costs_no_bytes() -> None:
    """An empty message costs no bytes."""
    traffic = InboundRateLimiter(byte_rate=1)
    assert [traffic.take("ann", "tab of ann", 0, 0.0) for _ in range(100)] == [None] * 100
