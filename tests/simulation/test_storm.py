"""Client and server keep their promises in every storm, and would break one without any of their protections."""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

import pytest

from fastapi_ws_stabilizer.client.send_buffer import SendBuffer
from fastapi_ws_stabilizer.sessions import store
from fastapi_ws_stabilizer.sessions.session import Session
from fastapi_ws_stabilizer.sessions.v1_protocol import V1Protocol
from tests.simulation.storm import SCENARIOS, Outcome, Scenario, Storm
from tests.support.virtual_time import run_virtually

pytestmark = pytest.mark.generated

SEEDS = range(1, 16)
MANY_SEEDS = range(1, 501)
MUTATION_SEEDS = range(1, 101)
NO_RESTARTS, LOSES, REWINDS, SMALL_LOG, _ = SCENARIOS


def storm(seed: int, scenario: Scenario) -> Outcome:
    """Run one storm."""
    return run_virtually(Storm(seed * 7919, scenario).run())


def first_violation(scenario: Scenario) -> str | None:
    """Return the violations of the first run that breaks a promise; `None` if no run does."""
    for seed in MUTATION_SEEDS:
        outcome = storm(seed, scenario)
        if outcome.violations:
            return outcome.violations[0]
    return None


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_storm_delivers_once_in_order_or_declares_gap(scenario: Scenario) -> None:
    """Messages arrive once and in order or in a declared gap, every promise settles, and the client ends connected."""
    counts: Counter[str] = Counter()
    for seed in SEEDS:
        outcome = storm(seed, scenario)
        assert outcome.violations == [], f"seed {seed}"
        counts.update(outcome.counts)
    assert counts["delivered"] > 100 * len(SEEDS)
    assert counts["closed 1006"] > len(SEEDS)
    assert counts["gaps"] > 0 or scenario is NO_RESTARTS


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_storm_promises_hold_for_500_seeds(scenario: Scenario) -> None:
    """The same promises hold in 500 storms of each kind."""
    assert [seed for seed in MANY_SEEDS if storm(seed, scenario).violations] == []


def test_missing_epoch_breaks_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the epoch a promise is broken."""
    monkeypatch.setattr(Session, "rewind", lambda session, lost: session.buffer.rewind(lost))
    assert first_violation(REWINDS) is not None


def test_missing_fence_breaks_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the fence a promise is broken."""

    def detach(self: Session, connection: Any) -> bool:
        self.connection = None
        return True

    monkeypatch.setattr(Session, "detach", detach)
    assert first_violation(NO_RESTARTS) is not None


def test_missing_second_token_breaks_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the window of two tokens a promise is broken."""
    present = Session.present

    def newest_only(self: Session, secret: str) -> int | None:
        self._confirmed = None
        return present(self, secret)

    monkeypatch.setattr(Session, "present", newest_only)
    assert first_violation(NO_RESTARTS) is not None


def test_missing_first_seq_check_breaks_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the check of the oldest number a promise is broken."""
    why = store.gap_reason

    def forgiving(session: Session, epoch: int, seq: int) -> str | None:
        found = why(session, epoch, seq)
        return None if found == "overflow" else found

    monkeypatch.setattr(store, "gap_reason", forgiving)
    monkeypatch.setattr(
        "fastapi_ws_stabilizer.sessions.replay_buffer.ReplayBuffer.since",
        lambda self, seq: self.entries[max(0, seq + 1 - self.first_seq) :],
    )
    assert first_violation(SMALL_LOG) is not None


def resend_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a client ignore which messages the welcome acknowledges."""

    def resumed(self: SendBuffer, accepted: int) -> None:
        self._next = max(self._next, accepted + 1)
        self._to_resend = deque(self._sent)

    monkeypatch.setattr(SendBuffer, "resume", resumed)


def test_resent_client_messages_are_handled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages that the server has accepted are handled once, however often they are sent again."""
    resend_everything(monkeypatch)
    assert [seed for seed in SEEDS if storm(seed, NO_RESTARTS).violations] == []


def test_missing_deduplication_breaks_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the check of the client's numbers a promise is broken.

    The fence and the welcome's `ack` prevent our own client from sending anything twice to a session that continues, so
    this uses a client that does not read `ack`.
    """
    resend_everything(monkeypatch)

    def always(self: V1Protocol, seq: int) -> bool:
        self.session.accepted = max(self.session.accepted, seq)
        self._acks.schedule(self._send_ack)
        return True

    monkeypatch.setattr(V1Protocol, "_is_next", always)
    assert first_violation(NO_RESTARTS) is not None


def test_storm_contains_takeovers_of_half_open_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """A storm has half-open connections, and the next connection takes the session over."""
    attach = Session.attach
    taken_over: list[bool] = []

    def note(self: Session, connection: Any, seq: int, welcome: Any) -> Any:
        taken_over.append(self.connection is not None)
        return attach(self, connection, seq, welcome)

    monkeypatch.setattr(Session, "attach", note)
    for seed in range(10):  # backoff and heartbeats have their own dice, so a single storm may have none
        assert storm(seed, NO_RESTARTS).violations == []
        if any(taken_over):
            return
    pytest.fail("no connection was taken over in ten storms")
