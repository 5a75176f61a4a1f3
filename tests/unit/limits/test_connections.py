"""Tests of who may come in."""

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
    """Let somebody knock and settle."""
    place = admission.reserve(address, 0.0)
    try:
        place.confirm(client_id, replaces=replaces)
    except ConnectionLimitExceededError:
        place.release()
        raise
    return place


# ── in all ──


def test_connection_over_max_connections_is_rejected() -> None:
    """The first one too many is refused, and told which option says so and when to come back."""
    admission = ConnectionLimiter(max_connections=2)
    enter(admission, "ann")
    enter(admission, "bob")
    with pytest.raises(ConnectionLimitExceededError) as refused:
        enter(admission, "cem")
    assert type(refused.value) is ConnectionLimitExceededError
    assert (refused.value.limit, refused.value.most) == ("max_connections", 2)
    assert 0.5 * RETRY_WHEN_FULL <= refused.value.retry_after <= 1.5 * RETRY_WHEN_FULL + 0.1
    assert len(admission) == 2


def test_limiter_without_limits_counts_nothing() -> None:
    """With no option set nobody is refused, whoever it is, and nobody is counted: all share a place."""
    admission = ConnectionLimiter()
    places = {enter(admission) for _ in range(1000)}
    assert len(places) == 1
    places.pop().release()
    enter(admission)
    assert len(admission) == 0


def test_released_reservation_frees_slot() -> None:
    """A place that was given back is free for the next."""
    admission = ConnectionLimiter(max_connections=1)
    enter(admission, "ann").release()
    enter(admission, "bob")


def test_reservation_is_released_only_once() -> None:
    """Leaving twice makes room for one, not for two."""
    admission = ConnectionLimiter(max_connections=2)
    ann, _ = enter(admission, "ann"), enter(admission, "bob")
    ann.release()
    ann.release()
    enter(admission, "cem")
    with pytest.raises(ConnectionLimitExceededError):
        enter(admission, "dan")


def test_repeated_confirm_of_reservation_counts_once() -> None:
    """A place that is settled stays one place."""
    admission = ConnectionLimiter(max_connections=2)
    place = enter(admission)
    place.confirm("ann")
    assert len(admission) == 1
    place.release()
    assert len(admission) == 0


def test_confirm_after_release_raises_and_counts_nothing() -> None:
    """A reservation that was released before it was confirmed counts no more."""
    admission = ConnectionLimiter(max_connections=1)
    place = admission.reserve("1.1.1.1", 0.0)
    place.release()
    with pytest.raises(ConnectionLimitExceededError):
        place.confirm("ann")
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
    """Under each limit a released reservation refuses its client with that limit, and is counted nowhere."""
    admission = ConnectionLimiter(**option)  # type: ignore[arg-type]
    place = admission.reserve("1.1.1.1", 0.0)
    if confirmed_before:
        place.confirm("ann")
    place.release()
    for _ in range(2):
        with pytest.raises(ConnectionLimitExceededError) as refused:
            place.confirm("ann")
        assert (type(refused.value), refused.value.limit, refused.value.most) == (error, limit, 2)
    assert (len(admission), admission._pending, place.client_id) == (0, 0, None)


# ── the lobby ──


def test_full_server_admits_min_pending_handshakes() -> None:
    """As many as the lobby holds may knock at a full server; the next is refused before anything is asked."""
    admission = ConnectionLimiter(max_connections=1)
    enter(admission, "ann")
    waiting = [admission.reserve("1.1.1.1", 0.0) for _ in range(MIN_PENDING)]
    with pytest.raises(ConnectionLimitExceededError):
        admission.reserve("1.1.1.1", 0.0)
    waiting[0].release()
    admission.reserve("1.1.1.1", 0.0)


def test_pending_handshakes_are_bounded_without_connections() -> None:
    """Before anybody is inside, no more may be on their way than there are places and the lobby holds."""
    admission = ConnectionLimiter(max_connections=3)
    for _ in range(3 + MIN_PENDING):
        admission.reserve("1.1.1.1", 0.0)
    with pytest.raises(ConnectionLimitExceededError):
        admission.reserve("1.1.1.1", 0.0)


def test_max_pending_scales_with_max_connections() -> None:
    """The lobby is a tenth of the connections where that is more than its least."""
    admission = ConnectionLimiter(max_connections=1000)
    for _ in range(1100):
        admission.reserve("1.1.1.1", 0.0)
    with pytest.raises(ConnectionLimitExceededError):
        admission.reserve("1.1.1.1", 0.0)


# ── instead of another ──


def test_replacement_needs_no_free_slot() -> None:
    """At a full server a client takes its old connection's place, and there are as many as before."""
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
    """If the old connection is over, and somebody else has its place, the new one needs room as any other."""
    admission = ConnectionLimiter(max_connections=1)
    old = enter(admission, "ann")
    old.release()
    enter(admission, "bob")
    with pytest.raises(ConnectionLimitExceededError):
        enter(admission, "ann", replaces=(old,))


def test_slot_of_replaced_connection_is_not_given_to_others() -> None:
    """If the old connection ends by itself while the new one is on its way, its place is not free for a third."""
    admission = ConnectionLimiter(max_connections=1)
    old = enter(admission, "ann")
    enter(admission, "ann", replaces=(old,))
    old.release()
    with pytest.raises(ConnectionLimitExceededError):
        enter(admission, "bob")


def test_replacements_of_one_connection_are_bounded() -> None:
    """One connection cannot be the ticket of any number of new ones that all wait in a handshake hook."""
    admission = ConnectionLimiter(max_connections=1)
    old = enter(admission, "ann")
    for _ in range(MIN_PENDING):
        enter(admission, "ann", replaces=(old,))
    with pytest.raises(ConnectionLimitExceededError):
        enter(admission, "ann", replaces=(old,))


# ── from one address ──


def test_address_limit_rejects_only_that_address() -> None:
    """Who is too many from its address is refused as such, and others are not."""
    admission = ConnectionLimiter(max_per_address=2)
    enter(admission, address="1.1.1.1")
    enter(admission, address="1.1.1.1")
    with pytest.raises(TooManyConnectionsError) as refused:
        enter(admission, address="1.1.1.1")
    assert (refused.value.limit, refused.value.most) == ("max_connections_per_address", 2)
    enter(admission, address="2.2.2.2")


def test_concurrent_handshakes_fill_address_limit() -> None:
    """Those who are on their way do not count against those who were let in before them."""
    admission = ConnectionLimiter(max_per_address=2)
    first, second, third = (admission.reserve("1.1.1.1", 0.0) for _ in range(3))
    first.confirm("ann")
    second.confirm("bob")
    with pytest.raises(TooManyConnectionsError):
        third.confirm("cem")


def test_pending_handshakes_of_address_are_bounded_by_limit() -> None:
    """As many as may be inside may also be on their way, and no more are asked who they are."""
    admission = ConnectionLimiter(max_per_address=2)
    for _ in range(4):
        admission.reserve("1.1.1.1", 0.0)
    with pytest.raises(TooManyConnectionsError):
        admission.reserve("1.1.1.1", 0.0)
    admission.reserve("2.2.2.2", 0.0)


def test_replacement_at_same_address_needs_no_slot() -> None:
    """A client that dials again from where it was takes its own place of that address."""
    admission = ConnectionLimiter(max_per_address=1)
    old = enter(admission, "ann")
    enter(admission, "ann", replaces=(old,))


def test_replacement_from_other_address_needs_slot() -> None:
    """Connections cannot be moved to one address until there are more than it may have."""
    admission = ConnectionLimiter(max_per_address=1)
    old = enter(admission, "ann", address="2.2.2.2")
    enter(admission, "bob", address="1.1.1.1")
    with pytest.raises(TooManyConnectionsError):
        enter(admission, "ann", address="1.1.1.1", replaces=(old,))


# ── of one client ──


def test_client_limit_rejects_only_that_client() -> None:
    """Who has too many connections is refused another one, and somebody else is not."""
    admission = ConnectionLimiter(max_per_client=2)
    first = enter(admission, "ann")
    enter(admission, "ann")
    with pytest.raises(TooManyConnectionsError) as refused:
        enter(admission, "ann")
    assert (refused.value.limit, refused.value.most) == ("max_connections_per_client", 2)
    enter(admission, "bob")
    first.release()
    enter(admission, "ann")


def test_takeover_of_own_session_is_within_client_limit() -> None:
    """A client at its limit may come back to a session whose connection is half-open, but not to that of another."""
    admission = ConnectionLimiter(max_per_client=1)
    ann, bob = enter(admission, "ann"), enter(admission, "bob")
    with pytest.raises(TooManyConnectionsError):
        enter(admission, "ann", replaces=(bob,))
    enter(admission, "ann", replaces=(ann,))


# ── how often ──


def test_handshakes_over_rate_are_rejected_with_retry_delay() -> None:
    """Who comes too often is refused, whoever it is, and told when it is its turn."""
    admission = ConnectionLimiter(rate=2)
    admission.reserve("1.1.1.1", 0.0)
    admission.reserve("2.2.2.2", 0.0)
    with pytest.raises(ConnectionLimitExceededError) as refused:
        admission.reserve("3.3.3.3", 0.1)
    assert type(refused.value) is ConnectionLimitExceededError
    assert refused.value.limit == "max_connect_rate"
    assert refused.value.retry_after == pytest.approx(0.4)
    admission.reserve("3.3.3.3", 0.1 + refused.value.retry_after)


def test_address_over_rate_does_not_use_up_global_rate() -> None:
    """What one address is refused for is not counted for the others."""
    admission = ConnectionLimiter(rate=3, rate_per_address=1)
    admission.reserve("1.1.1.1", 0.0)
    for _ in range(10):
        with pytest.raises(TooManyConnectionsError) as refused:
            admission.reserve("1.1.1.1", 0.0)
        assert refused.value.limit == "max_connect_rate_per_address"
    admission.reserve("2.2.2.2", 0.0)
    admission.reserve("3.3.3.3", 0.0)


def test_rate_below_one_per_second_admits_one() -> None:
    """One connection a minute means one now, and the next in a minute."""
    admission = ConnectionLimiter(rate=1 / 60)
    admission.reserve("1.1.1.1", 0.0)
    with pytest.raises(ConnectionLimitExceededError) as refused:
        admission.reserve("1.1.1.1", 0.0)
    assert refused.value.retry_after == pytest.approx(60)


@pytest.mark.parametrize("options", [{"rate": 1}, {"rate_per_address": 1}], ids=["in all", "by address"])
def test_handshake_over_rate_holds_no_reservation(options: dict[str, float]) -> None:
    """Refusals leave nothing behind that is counted."""
    admission = ConnectionLimiter(max_connections=1, max_per_address=1, **options)  # type: ignore[arg-type]
    admission.reserve("1.1.1.1", 0.0).release()
    for _ in range(100):
        with pytest.raises(ConnectionLimitExceededError):
            admission.reserve("1.1.1.1", 0.0)
    enter_later = admission.reserve("1.1.1.1", 1.0)
    enter_later.confirm("ann")
    assert len(admission) == 1


# ── all of it ──

MOST, PER_CLIENT, PER_ADDRESS = 4, 2, 3
PENDING = 16


PICK = st.integers(0, 10_000)


class Counts(RuleBasedStateMachine):
    """After any sequence of comings and goings the counts are those that a full count gives."""

    def __init__(self) -> None:
        super().__init__()
        self.admission = ConnectionLimiter(max_connections=MOST, max_per_client=PER_CLIENT, max_per_address=PER_ADDRESS)
        self.there: dict[Reservation, str | None] = {}
        self.came: list[Reservation] = []

    @property
    def inside(self) -> list[Reservation]:
        """The places that are settled."""
        return [place for place, who in self.there.items() if who is not None]

    @property
    def waiting(self) -> list[Reservation]:
        """The places that are not."""
        return [place for place, who in self.there.items() if who is None]

    @rule(address=st.sampled_from(["1.1.1.1", "2.2.2.2", "3.3.3.3", "4.4.4.4", "5.5.5.5", "6.6.6.6"]))
    def knock(self, address: str) -> None:
        """Somebody comes."""
        if sum(place.address == address for place in self.there) >= 2 * PER_ADDRESS:
            with pytest.raises(TooManyConnectionsError, match="max_connections_per_address"):
                self.admission.reserve(address, 0.0)
        elif len(self.there) >= MOST + PENDING:
            with pytest.raises(ConnectionLimitExceededError, match="max_connections is"):
                self.admission.reserve(address, 0.0)
        else:
            self.came.append(self.admission.reserve(address, 0.0))
            self.there[self.came[-1]] = None

    @precondition(lambda self: self.waiting)
    @rule(pick=PICK, client_id=st.sampled_from(["ann", "bob", "cem", "dan"]), others=st.lists(PICK, max_size=2))
    def settle(self, pick: int, client_id: str, others: list[int]) -> None:
        """It is known who it is."""
        place = self.waiting[pick % len(self.waiting)]
        named = [self.came[one % len(self.came)] for one in others]  # some are gone, or not settled
        replaced = [one for one in named if one in self.inside]
        here = [one for one in self.inside if one.address == place.address]
        its_own = [one for one in self.inside if one.client_id == client_id]
        refused: type[ConnectionLimitExceededError] | None = None
        too_many = len(here) - any(one in replaced for one in here) >= PER_ADDRESS
        too_many |= len(its_own) - any(one in replaced for one in its_own) >= PER_CLIENT
        if too_many:
            refused = TooManyConnectionsError
        elif not replaced and len(self.inside) >= MOST:
            refused = ConnectionLimitExceededError
        if refused is None:
            place.confirm(client_id, replaces=named)
            self.there[place] = client_id
        else:
            with pytest.raises(refused) as error:
                place.confirm(client_id, replaces=named)
            assert error.type is refused

    @precondition(lambda self: len(self.came) > len(self.there))
    @rule(pick=PICK, client_id=st.sampled_from(["ann", "bob"]), others=st.lists(PICK, max_size=2))
    def settle_released(self, pick: int, client_id: str, others: list[int]) -> None:
        """A client whose reservation was released says who it is after all."""
        released = [place for place in self.came if place not in self.there]
        with pytest.raises(ConnectionLimitExceededError):
            released[pick % len(released)].confirm(
                client_id, replaces=[self.came[one % len(self.came)] for one in others]
            )

    @precondition(lambda self: self.came)
    @rule(pick=PICK)
    def leave(self, pick: int) -> None:
        """It goes, for the first time or once more."""
        place = self.came[pick % len(self.came)]
        place.release()
        self.there.pop(place, None)

    @invariant()
    def counts_are_true(self) -> None:
        """The running sums are those of a full count, and nothing is kept of those who are gone.

        More than there is room for are there only as long as those whom they replace.
        """
        admission = self.admission
        inside, waiting = self.inside, self.waiting
        assert len(admission) == len(inside)
        assert len(inside) + len(waiting) <= MOST + PENDING
        assert admission._pending == len(waiting)
        assert admission._from_address._counts == Counter(place.address for place in inside)
        assert admission._pending_from._counts == Counter(place.address for place in waiting)
        assert admission._of_client._counts == Counter(place.client_id for place in inside)


TestCounts = Counts.TestCase
TestCounts.settings = settings(max_examples=60, stateful_step_count=60)


@pytest.mark.parametrize("option", ["rate", "rate_per_address"])
def test_retry_delays_over_rate_are_spread(option: str) -> None:
    """Those that come too often are asked back one after the other, over the time that the rate needs for all."""
    admission = ConnectionLimiter(**{option: 10.0})
    told = []
    for number in range(120):
        now = 100.0 + number * 1e-4
        try:
            admission.reserve("1.1.1.1", now)
        except (ConnectionLimitExceededError, TooManyConnectionsError) as refused:
            told.append(now + refused.retry_after)
    assert len(told) == 110
    assert min(after - before for before, after in pairwise(told)) > 0.09
    assert told[-1] == pytest.approx(111.0, abs=0.2)
    for when in told:  # each of them comes when it was told, and is let in
        admission.reserve("1.1.1.1", when)


def test_retry_delays_of_address_do_not_affect_other_address() -> None:
    """Each address has a queue of its own, and an empty queue is forgotten."""
    admission = ConnectionLimiter(rate_per_address=1.0)
    for _ in range(50):
        with contextlib.suppress(TooManyConnectionsError):
            admission.reserve("1.1.1.1", 0.0)
    admission.reserve("2.2.2.2", 0.0)
    with pytest.raises(TooManyConnectionsError) as refused:
        admission.reserve("2.2.2.2", 0.0)
    assert refused.value.retry_after == pytest.approx(1.0)


def test_retry_delays_at_full_server_are_spread() -> None:
    """Of those that find no room no more than a hundred are asked back in each second."""
    admission = ConnectionLimiter(max_connections=1)
    told = []
    for _ in range(3000):
        try:
            admission.reserve("1.1.1.1", 0.0)
        except ConnectionLimitExceededError as refused:
            told.append(refused.retry_after)
    assert max(told) > 25
    assert max(Counter(round(wait) for wait in told).values()) < 200


def test_address_ignoring_retry_delay_does_not_delay_others() -> None:
    """What is refused by the limit of an address moves nobody back in the queue for room."""
    admission = ConnectionLimiter(max_connections=1, rate_per_address=5)
    enter(admission)
    for number in range(MIN_PENDING):
        admission.reserve(f"2.2.2.{number}", 0.0)
    for _ in range(10_000):
        with pytest.raises((TooManyConnectionsError, ConnectionLimitExceededError)):
            admission.reserve("6.6.6.6", 0.0)
    with pytest.raises(ConnectionLimitExceededError) as refused:
        admission.reserve("3.3.3.3", 0.0)
    assert refused.value.retry_after <= 1.5 * RETRY_WHEN_FULL + 0.1
