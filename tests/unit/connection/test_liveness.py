"""Tests of the liveness of one connection."""

from __future__ import annotations

import pytest

from fastapi_ws_stabilizer.connection.liveness import FREE_PONGS, MAX_OPEN_PINGS, Liveness


def test_new_connection_has_no_outstanding_ping() -> None:
    """A new connection counts as seen when it opens, and has no open ping."""
    liveness = Liveness(10.0)
    assert (liveness.last_seen, liveness.awaiting_since, liveness.has_ponged, liveness.rtt) == (10.0, None, False, None)


def test_inbound_frame_clears_outstanding_ping() -> None:
    """Any inbound frame proves life, not only a pong."""
    liveness = Liveness(0.0)
    liveness.on_ping_queued(5.0)
    assert liveness.awaiting_since == 5.0
    liveness.on_frame(6.0)
    assert (liveness.last_seen, liveness.awaiting_since) == (6.0, None)
    assert not liveness.has_ponged


def test_pong_measures_round_trip() -> None:
    """The round trip is the time from the ping to its pong."""
    liveness = Liveness(0.0)
    liveness.on_ping_queued(5.0)
    liveness.on_frame(5.25)
    liveness.on_pong(5.25)
    assert liveness.has_ponged
    assert liveness.rtt == pytest.approx(0.25)


def test_unsolicited_pong_does_not_change_round_trip() -> None:
    """An unsolicited pong shows that the client answers, and does not change the round trip."""
    liveness = Liveness(0.0)
    liveness.on_ping_queued(1.0)
    liveness.on_pong(1.5)
    liveness.on_pong(9.0)
    assert liveness.rtt == pytest.approx(0.5)


def exhausted() -> Liveness:
    """Return the liveness of a client that has sent all unsolicited pongs that are free."""
    liveness = Liveness(0.0)
    assert [liveness.on_pong(0.5) for _ in range(FREE_PONGS)] == [0] * FREE_PONGS
    return liveness


def test_pongs_beyond_pings_sent_are_unsolicited() -> None:
    """Pongs without a matching ping are unsolicited, whether early or late."""
    liveness = exhausted()
    assert liveness.on_pong(0.5)
    liveness.on_ping_queued(1.0)
    liveness.on_unmeasured_ping()
    payload = liveness.start_ping(2.0)
    liveness.clear_deadline()
    answers = [
        liveness.on_pong_frame(b"late", 3.0),
        liveness.on_pong_frame(payload, 3.0),
        liveness.on_pong(3.0),
    ]
    assert answers == [0, 0, 0]
    assert [liveness.on_pong(3.0) for _ in range(FREE_PONGS)] == [0] * FREE_PONGS
    assert liveness.on_pong_frame(payload, 3.0)


def test_pong_after_free_ones_counts_for_all() -> None:
    """A few pongs as a sign of life are free, but a flood of pongs is counted from its first one."""
    liveness = exhausted()
    assert [liveness.on_pong(0.5) for _ in range(3)] == [FREE_PONGS + 1, 1, 1]
    liveness.on_ping_queued(1.0)
    assert [liveness.on_pong(1.5) for _ in range(2)] == [0, 0]


def test_outstanding_pings_are_bounded() -> None:
    """A client that was silent for days may not send as many pongs as it was sent pings."""
    liveness = Liveness(0.0)
    for number in range(2 * MAX_OPEN_PINGS):
        liveness.on_ping_queued(float(number))
    free = MAX_OPEN_PINGS + FREE_PONGS
    assert [liveness.on_pong(1e6) for _ in range(free + 1)] == [0] * free + [FREE_PONGS + 1]


def test_round_trip_is_measured_from_oldest_open_ping() -> None:
    """A client that answers late does not get a shorter round trip because it was pinged again."""
    liveness = Liveness(0.0)
    liveness.on_pong(0.5)
    liveness.on_ping_queued(1.0)
    liveness.on_ping_queued(2.0)
    assert liveness.awaiting_since == 1.0
    liveness.on_pong(2.5)
    assert liveness.rtt == pytest.approx(1.5)


def test_data_between_ping_and_pong_does_not_shorten_rtt() -> None:
    """TCP preserves order, so the first pong answers the first open ping, whatever was received in between."""
    liveness = Liveness(0.0)
    liveness.on_pong(0.5)
    liveness.on_ping_queued(1.0)
    liveness.on_frame(1.1)
    liveness.on_ping_queued(2.0)
    liveness.on_frame(2.1)
    liveness.on_pong(2.1)
    assert liveness.rtt == pytest.approx(1.1)


def test_first_pong_is_measured_from_last_ping() -> None:
    """The round trip of a client that has ignored pings for long does not include that time."""
    liveness = Liveness(0.0)
    liveness.on_ping_queued(1.0)
    liveness.on_ping_queued(100.0)
    liveness.on_pong(100.5)
    assert liveness.rtt == pytest.approx(0.5)


def test_reset_deadline_clears_ping_and_measurement() -> None:
    """After a pause of the server the client owes no pong, and a pong after it measures nothing."""
    liveness = Liveness(0.0)
    liveness.on_ping_queued(1.0)
    liveness.clear_deadline()
    assert liveness.awaiting_since is None
    liveness.on_pong(50.0)
    assert liveness.rtt is None
    assert liveness.has_ponged
