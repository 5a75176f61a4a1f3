"""Tests of connection limits."""

from __future__ import annotations

import contextlib
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fastapi_ws_stabilizer.errors import ConnectionLimitExceededError, TooManyConnectionsError
from fastapi_ws_stabilizer.limits.connections import MIN_PENDING, RETRY_WHEN_FULL, ConnectionLimiter, Reservation


def enter(
    admission: ConnectionLimiter,
    client_id: str = "ann",
    *,
    address: str = "1.1.1.1",
    replaces: tuple[Reservation, ...] = (),
) -> Reservation:
    """Reserve a slot, and confirm it for the client."""
    reservation = admission.reserve(address, 0.0)
    try:
        reservation.confirm(client_id, replaces=replaces)
    except ConnectionLimitExceededError:
        reservation.release()
        raise
    return reservation


# ── total ──


def test_connection_over_max_connections_is_rejected() -> None:
    """A connection above max_connections raises with the option, its value and a retry delay."""
    admission = ConnectionLimiter(max_connections=2)
    enter(admission, "ann")
    enter(admission, "bob")
    with pytest.raises(ConnectionLimitExceededError) as rejected:
        enter(admission, "cem")
    assert type(rejected.value) is ConnectionLimitExceededError
    assert (rejected.value.option, rejected.value.limit) == ("max_connections", 2)
    assert 0.5 * RETRY_WHEN_FULL <= rejected.value.retry_after <= 1.5 * RETRY_WHEN_FULL + 0.1
    assert len(admission) == 2


def test_limiter_without_limits_counts_nothing() -> None:
    """Without options no connection is rejected or counted, and all share one reservation."""
    admission = ConnectionLimiter()
    reservations = {enter(admission) for _ in range(1000)}
    assert len(reservations) == 1
    reservations.pop().release()
    enter(admission)
    assert len(admission) == 0


def test_released_reservation_frees_slot() -> None:
    """A released slot is free for the next connection."""
    admission = ConnectionLimiter(max_connections=1)
    enter(admission, "ann").release()
    enter(admission, "bob")


def test_reservation_is_released_only_once() -> None:
    """A second release of a reservation frees no second slot."""
    admission = ConnectionLimiter(max_connections=2)
    ann, _ = enter(admission, "ann"), enter(admission, "bob")
    ann.release()
    ann.release()
    enter(admission, "cem")
    with pytest.raises(ConnectionLimitExceededError):
        enter(admission, "dan")


def test_repeated_confirm_of_reservation_counts_once() -> None:
    """A second confirm of a reservation counts no second connection."""
    admission = ConnectionLimiter(max_connections=2)
    reservation = enter(admission)
    reservation.confirm("ann")
    assert len(admission) == 1
    reservation.release()
    assert len(admission) == 0


def test_confirm_after_release_raises_and_counts_nothing() -> None:
    """A reservation that is released before its confirm counts nothing, and the confirm raises."""
    admission = ConnectionLimiter(max_connections=1)
    reservation = admission.reserve("1.1.1.1", 0.0)
    reservation.release()
    with pytest.raises(ConnectionLimitExceededError):
        reservation.confirm("ann")
    assert len(admission) == 0


@pytest.mark.parametrize(
    ("option", "limit", "error"),
    [
        ({"max_connections": 2}, "max_connections", ConnectionLimitExceededError),
        ({"max_per_address": 2}, "max_connections_per_address", TooManyConnectionsError),
        ({"max_per_client": 2}, "max_connections_per_client", TooManyConnectionsError),
        ({"rate": 2}, "max_connect_rate", ConnectionLimitExceededError),
        ({"rate_per_address": 2}, "max_connect_rate_per_address", ConnectionLimitExceededError),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("confirmed_before", [False, True])
def test_released_reservation_cannot_be_confirmed(
    option: dict[str, float], limit: str, error: type[Exception], confirmed_before: bool
) -> None:
    """Under each limit, the confirm of a released reservation raises the error of that limit and counts nothing."""
    admission = ConnectionLimiter(**option)  # type: ignore[arg-type]
    reservation = admission.reserve("1.1.1.1", 0.0)
    if confirmed_before:
        reservation.confirm("ann")
    reservation.release()
    for _ in range(2):
        with pytest.raises(ConnectionLimitExceededError) as rejected:
            reservation.confirm("ann")
        assert (type(rejected.value), rejected.value.option, rejected.value.limit) == (error, limit, 2)
    assert (len(admission), admission._pending, reservation.client_id) == (0, 0, None)


# ── pending handshakes ──


def test_full_server_admits_min_pending_handshakes() -> None:
    """A full server accepts MIN_PENDING pending handshakes and rejects the next one."""
    admission = ConnectionLimiter(max_connections=1)
    enter(admission, "ann")
    waiting = [admission.reserve("1.1.1.1", 0.0) for _ in range(MIN_PENDING)]
    with pytest.raises(ConnectionLimitExceededError):
        admission.reserve("1.1.1.1", 0.0)
    waiting[0].release()
    admission.reserve("1.1.1.1", 0.0)


def test_pending_handshakes_are_bounded_without_connections() -> None:
    """Without connections, pending handshakes are bounded by max_connections + MIN_PENDING."""
    admission = ConnectionLimiter(max_connections=3)
    for _ in range(3 + MIN_PENDING):
        admission.reserve("1.1.1.1", 0.0)
    with pytest.raises(ConnectionLimitExceededError):
        admission.reserve("1.1.1.1", 0.0)


def test_max_pending_scales_with_max_connections() -> None:
    """The bound of pending handshakes is a tenth of max_connections, if that is above MIN_PENDING."""
    admission = ConnectionLimiter(max_connections=1000)
    for _ in range(1100):
        admission.reserve("1.1.1.1", 0.0)
    with pytest.raises(ConnectionLimitExceededError):
        admission.reserve("1.1.1.1", 0.0)


# ── replacement ──


def test_replacement_needs_no_free_slot() -> None:
    """At a full server a client replaces its old connection, and the count stays the same."""
    admission = ConnectionLimiter(max_connections=1)
    old = enter(admission, "ann")
    new = enter(admission, "ann", replaces=(old,))
    old.release()
    assert len(admission) == 1
    with pytest.raises(ConnectionLimitExceededError):
        enter(admission, "bob")
    new.release()
    enter(admission, "bob")


def test_released_reservation_cannot_be_replaced() -> None:
    """If another client has the slot of the released connection, the new one needs a free slot."""
    admission = ConnectionLimiter(max_connections=1)
    old = enter(admission, "ann")
    old.release()
    enter(admission, "bob")
    with pytest.raises(ConnectionLimitExceededError):
        enter(admission, "ann", replaces=(old,))


def test_slot_of_replaced_connection_is_not_given_to_others() -> None:
    """If the old connection closes before its replacement is open, its slot is not free for others."""
    admission = ConnectionLimiter(max_connections=1)
    old = enter(admission, "ann")
    enter(admission, "ann", replaces=(old,))
    old.release()
    with pytest.raises(ConnectionLimitExceededError):
        enter(admission, "bob")


def test_replacements_of_one_connection_are_bounded() -> None:
    """The number of pending replacements of one connection is bounded."""
    admission = ConnectionLimiter(max_connections=1)
    old = enter(admission, "ann")
    for _ in range(MIN_PENDING):
        enter(admission, "ann", replaces=(old,))
    with pytest.raises(ConnectionLimitExceededError):
        enter(admission, "ann", replaces=(old,))


# ── per address ──


def test_address_limit_rejects_only_that_address() -> None:
    """An address above its limit is rejected with that option, and other addresses are not."""
    admission = ConnectionLimiter(max_per_address=2)
    enter(admission, address="1.1.1.1")
    enter(admission, address="1.1.1.1")
    with pytest.raises(TooManyConnectionsError) as rejected:
        enter(admission, address="1.1.1.1")
    assert (rejected.value.option, rejected.value.limit) == ("max_connections_per_address", 2)
    enter(admission, address="2.2.2.2")


def test_concurrent_handshakes_fill_address_limit() -> None:
    """Pending handshakes do not use up the limit of their address before they are confirmed."""
    admission = ConnectionLimiter(max_per_address=2)
    first, second, third = (admission.reserve("1.1.1.1", 0.0) for _ in range(3))
    first.confirm("ann")
    second.confirm("bob")
    with pytest.raises(TooManyConnectionsError):
        third.confirm("cem")


def test_pending_handshakes_of_address_are_bounded_by_limit() -> None:
    """An address may have as many pending handshakes as connections, and other addresses are not affected."""
    admission = ConnectionLimiter(max_per_address=2)
    for _ in range(4):
        admission.reserve("1.1.1.1", 0.0)
    with pytest.raises(TooManyConnectionsError):
        admission.reserve("1.1.1.1", 0.0)
    admission.reserve("2.2.2.2", 0.0)


def test_replacement_at_same_address_needs_no_slot() -> None:
    """A replacement from the same address uses its own slot of that address."""
    admission = ConnectionLimiter(max_per_address=1)
    old = enter(admission, "ann")
    enter(admission, "ann", replaces=(old,))


def test_replacement_from_other_address_needs_slot() -> None:
    """A replacement from another address needs a free slot of that address."""
    admission = ConnectionLimiter(max_per_address=1)
    old = enter(admission, "ann", address="2.2.2.2")
    enter(admission, "bob", address="1.1.1.1")
    with pytest.raises(TooManyConnectionsError):
        enter(admission, "ann", address="1.1.1.1", replaces=(old,))


# ── per client ──


def test_client_limit_rejects_only_that_client() -> None:
    """A client above its limit is rejected with that option, and other clients are not."""
    admission = ConnectionLimiter(max_per_client=2)
    first = enter(admission, "ann")
    enter(admission, "ann")
    with pytest.raises(TooManyConnectionsError) as rejected:
        enter(admission, "ann")
    assert (rejected.value.option, rejected.value.limit) == ("max_connections_per_client", 2)
    enter(admission, "bob")
    first.release()
    enter(admission, "ann")


def test_takeover_of_own_session_is_within_client_limit() -> None:
    """A client at its limit may replace its own connection, but not a connection of another client."""
    admission = ConnectionLimiter(max_per_client=1)
    ann, bob = enter(admission, "ann"), enter(admission, "bob")
    with pytest.raises(TooManyConnectionsError):
        enter(admission, "ann", replaces=(bob,))
    enter(admission, "ann", replaces=(ann,))


# ── rates ──


def test_handshakes_over_rate_are_rejected_with_retry_delay() -> None:
    """A handshake above the rate is rejected with the delay after which it is accepted."""
    admission = ConnectionLimiter(rate=2)
    admission.reserve("1.1.1.1", 0.0)
    admission.reserve("2.2.2.2", 0.0)
    with pytest.raises(ConnectionLimitExceededError) as rejected:
        admission.reserve("3.3.3.3", 0.1)
    assert type(rejected.value) is ConnectionLimitExceededError
    assert rejected.value.option == "max_connect_rate"
    assert rejected.value.retry_after == pytest.approx(0.4)
    admission.reserve("3.3.3.3", 0.1 + rejected.value.retry_after)


def test_address_over_rate_does_not_use_up_global_rate() -> None:
    """A handshake that the rate of its address rejects does not count for the total rate."""
    admission = ConnectionLimiter(rate=3, rate_per_address=1)
    admission.reserve("1.1.1.1", 0.0)
    for _ in range(10):
        with pytest.raises(TooManyConnectionsError) as rejected:
            admission.reserve("1.1.1.1", 0.0)
        assert rejected.value.option == "max_connect_rate_per_address"
    admission.reserve("2.2.2.2", 0.0)
    admission.reserve("3.3.3.3", 0.0)


def test_rate_below_one_per_second_admits_one() -> None:
    """A rate of one per minute admits one handshake at once and the next one after 60 s."""
    admission = ConnectionLimiter(rate=1 / 60)
    admission.reserve("1.1.1.1", 0.0)
    with pytest.raises(ConnectionLimitExceededError) as rejected:
        admission.reserve("1.1.1.1", 0.0)
    assert rejected.value.retry_after == pytest.approx(60)


@pytest.mark.parametrize("options", [{"rate": 1}, {"rate_per_address": 1}], ids=["in all", "by address"])
def test_handshake_over_rate_holds_no_reservation(options: dict[str, float]) -> None:
    """A handshake above a rate leaves no reservation."""
    admission = ConnectionLimiter(max_connections=1, max_per_address=1, **options)  # type: ignore[arg-type]
    admission.reserve("1.1.1.1", 0.0).release()
    for _ in range(100):
        with pytest.raises(ConnectionLimitExceededError):
            admission.reserve("1.1.1.1", 0.0)
    later = admission.reserve("1.1.1.1", 1.0)
    later.confirm("ann")
    assert len(admission) == 1


# ── model ──

MOST, PER_CLIENT, PER_ADDRESS = 4, 2, 3
PENDING = 16


PICK = st.integers(0, 10_000)


class Counts(RuleBasedStateMachine):
    """State machine that compares the counts with a full count after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.admission = ConnectionLimiter(max_connections=MOST, max_per_client=PER_CLIENT, max_per_address=PER_ADDRESS)
        self.active: dict[Reservation, str | None] = {}
        self.created: list[Reservation] = []

    @property
    def inside(self) -> list[Reservation]:
        """The confirmed reservations."""
        return [reservation for reservation, client_id in self.active.items() if client_id is not None]

    @property
    def waiting(self) -> list[Reservation]:
        """The pending reservations."""
        return [reservation for reservation, client_id in self.active.items() if client_id is None]

    @rule(address=st.sampled_from(["1.1.1.1", "2.2.2.2", "3.3.3.3", "4.4.4.4", "5.5.5.5", "6.6.6.6"]))
    def reserve(self, address: str) -> None:
        """Reserve a slot."""
        if sum(reservation.address == address for reservation in self.active) >= 2 * PER_ADDRESS:
            with pytest.raises(TooManyConnectionsError, match="max_connections_per_address"):
                self.admission.reserve(address, 0.0)
        elif len(self.active) >= MOST + PENDING:
            with pytest.raises(ConnectionLimitExceededError, match="max_connections is"):
                self.admission.reserve(address, 0.0)
        else:
            self.created.append(self.admission.reserve(address, 0.0))
            self.active[self.created[-1]] = None

    @precondition(lambda self: self.waiting)
    @rule(pick=PICK, client_id=st.sampled_from(["ann", "bob", "cem", "dan"]), others=st.lists(PICK, max_size=2))
    def confirm(self, pick: int, client_id: str, others: list[int]) -> None:
        """Confirm a reservation."""
        reservation = self.waiting[pick % len(self.waiting)]
        named = [self.created[one % len(self.created)] for one in others]  # some are released or pending
        replaced = [one for one in named if one in self.inside]
        same_address = [one for one in self.inside if one.address == reservation.address]
        same_client = [one for one in self.inside if one.client_id == client_id]
        rejected: type[ConnectionLimitExceededError] | None = None
        too_many = len(same_address) - any(one in replaced for one in same_address) >= PER_ADDRESS
        too_many |= len(same_client) - any(one in replaced for one in same_client) >= PER_CLIENT
        if too_many:
            rejected = TooManyConnectionsError
        elif not replaced and len(self.inside) >= MOST:
            rejected = ConnectionLimitExceededError
        if rejected is None:
            reservation.confirm(client_id, replaces=named)
            self.active[reservation] = client_id
        else:
            with pytest.raises(rejected) as error:
                reservation.confirm(client_id, replaces=named)
            assert error.type is rejected

    @precondition(lambda self: len(self.created) > len(self.active))
    @rule(pick=PICK, client_id=st.sampled_from(["ann", "bob"]), others=st.lists(PICK, max_size=2))
    def confirm_released(self, pick: int, client_id: str, others: list[int]) -> None:
        """Confirm a released reservation."""
        released = [reservation for reservation in self.created if reservation not in self.active]
        with pytest.raises(ConnectionLimitExceededError):
            released[pick % len(released)].confirm(
                client_id, replaces=[self.created[one % len(self.created)] for one in others]
            )

    @precondition(lambda self: self.created)
    @rule(pick=PICK)
    def release(self, pick: int) -> None:
        """Release a reservation, possibly again."""
        reservation = self.created[pick % len(self.created)]
        reservation.release()
        self.active.pop(reservation, None)

    @invariant()
    def counts_match(self) -> None:
        """The counts equal a full count, and released reservations leave no entries.

        Connections exceed a limit only together with those that they replace.
        """
        admission = self.admission
        inside, waiting = self.inside, self.waiting
        assert len(admission) == len(inside)
        assert len(inside) + len(waiting) <= MOST + PENDING
        assert admission._pending == len(waiting)
        assert admission._from_address._counts == Counter(reservation.address for reservation in inside)
        assert admission._pending_from._counts == Counter(reservation.address for reservation in waiting)
        assert admission._of_client._counts == Counter(reservation.client_id for reservation in inside)


TestCounts = Counts.TestCase
TestCounts.settings = settings(max_examples=60, stateful_step_count=60)


@pytest.mark.parametrize("option", ["rate", "rate_per_address"])
def test_retry_delays_over_rate_are_spread(option: str) -> None:
    """Retry delays of handshakes above a rate are spread over the time that the rate needs for all of them."""
    admission = ConnectionLimiter(**{option: 10.0})
    retry_times = []
    for number in range(120):
        now = 100.0 + number * 1e-4
        try:
            admission.reserve("1.1.1.1", now)
        except (ConnectionLimitExceededError, TooManyConnectionsError) as rejected:
            retry_times.append(now + rejected.retry_after)
    assert len(retry_times) == 110
    assert min(after - before for before, after in pairwise(retry_times)) > 0.09
    assert retry_times[-1] == pytest.approx(111.0, abs=0.2)
    for when in retry_times:  # each client returns after its delay and is accepted
        admission.reserve("1.1.1.1", when)


def test_retry_delays_of_address_do_not_affect_other_address() -> None:
    """Each address has its own retry queue."""
    admission = ConnectionLimiter(rate_per_address=1.0)
    for _ in range(50):
        with contextlib.suppress(TooManyConnectionsError):
            admission.reserve("1.1.1.1", 0.0)
    admission.reserve("2.2.2.2", 0.0)
    with pytest.raises(TooManyConnectionsError) as rejected:
        admission.reserve("2.2.2.2", 0.0)
    assert rejected.value.retry_after == pytest.approx(1.0)


def test_retry_delays_at_full_server_are_spread() -> None:
    """Retry delays at a full server are spread: of 3,000 clients, fewer than 200 return in any second."""
    admission = ConnectionLimiter(max_connections=1)
    retry_times = []
    for _ in range(3000):
        try:
            admission.reserve("1.1.1.1", 0.0)
        except ConnectionLimitExceededError as rejected:
            retry_times.append(rejected.retry_after)
    assert max(retry_times) > 25
    assert max(Counter(round(wait) for wait in retry_times).values()) < 200


def test_address_ignoring_retry_delay_does_not_delay_others() -> None:
    """Rejections by the rate of an address do not lengthen the retry delays of other clients."""
    admission = ConnectionLimiter(max_connections=1, rate_per_address=5)
    enter(admission)
    for number in range(MIN_PENDING):
        admission.reserve(f"2.2.2.{number}", 0.0)
    for _ in range(10_000):
        with pytest.raises((TooManyConnectionsError, ConnectionLimitExceededError)):
            admission.reserve("6.6.6.6", 0.0)
    with pytest.raises(ConnectionLimitExceededError) as rejected:
        admission.reserve("3.3.3.3", 0.0)
    assert rejected.value.retry_after <= 1.5 * RETRY_WHEN_FULL + 0.1
