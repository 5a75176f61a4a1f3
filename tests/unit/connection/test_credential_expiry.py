"""Tests of credential expiry: when a renewal is requested, and when the connection closes."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from fastapi_ws_stabilizer.close_codes import CloseInfo, DisconnectReason, local_close
from fastapi_ws_stabilizer.connection.credential_expiry import (
    MAX_RENEWAL_CHARS,
    CredentialExpiry,
    parse_renewal,
)
from fastapi_ws_stabilizer.wire.v1.frames import to_milliseconds
from tests.support.fake_link import virtually


class ExpiryHarness:
    """Connection that records calls, with the time."""

    def __init__(self) -> None:
        self.close_info: CloseInfo | None = None
        self.sent: list[tuple[float, dict[str, Any]]] = []
        self.closes: list[tuple[float, int | None]] = []
        self.validated: list[str | None] = []
        self.term = CredentialExpiry()
        self.resources = SimpleNamespace(listener=self)

    def on_renewal(self, _: ExpiryHarness, credential: str | None) -> None:
        """Record a credential."""
        self.validated.append(credential)

    def answer(self, frame: Any) -> None:
        """Record a control frame."""
        self.sent.append((now(), json.loads(frame.text)))

    def close(self, cause: DisconnectReason, *, code: int | None = None, reason: str | None = None) -> bool:
        """Record a close."""
        assert cause is DisconnectReason.POLICY
        assert reason == "the credential has expired"
        self.closes.append((now(), code))
        self.close_info = local_close(cause, code=code, reason=reason)
        return True


def now() -> float:
    """Return the time of the test's clock."""
    return round(asyncio.get_running_loop().time(), 3)


@pytest.mark.parametrize(
    ("lifetime", "asked_at"),
    [
        (3600.0, 3570.0),  # at most 30 s before
        (100.0, 80.0),  # a fifth is left
        (10.0, 8.0),
        (4.0, 3.0),  # at least 1 s before
        (2.0, 1.0),
        (1.0, 0.5),  # half of a short one
        (0.02, 0.01),
    ],
)
@virtually
async def test_client_gets_renewal_request_then_4401_at_expiry(lifetime: float, asked_at: float) -> None:
    """The notice depends on the credential's lifetime, and the connection closes with 4401 at expiry."""
    harness = ExpiryHarness()
    harness.term.reset(harness, lifetime)
    await asyncio.sleep(lifetime + 1)
    assert harness.sent == [(asked_at, {"type": "auth", "in": to_milliseconds(lifetime - asked_at)})]
    assert harness.closes == [(lifetime, 4401)]


@virtually
async def test_credential_without_expiry_is_never_requested() -> None:
    """Without an expiry no renewal is requested."""
    harness = ExpiryHarness()
    harness.term.reset(harness, None)
    await asyncio.sleep(1e6)
    assert (harness.sent, harness.closes) == ([], [])


@virtually
async def test_renewed_credential_schedules_next_renewal() -> None:
    """The client gets a confirmation, and the next renewal is scheduled."""
    harness = ExpiryHarness()
    harness.term.reset(harness, 10.0)
    await asyncio.sleep(8.5)
    harness.term.request_renewal(harness, "new")
    assert harness.validated == ["new"]
    harness.term.renewed(harness, 10.0)
    await asyncio.sleep(9.0)
    assert [frame for _, frame in harness.sent] == [
        {"type": "auth", "in": 2000},
        {"type": "auth", "ok": True, "in": 10_000},
        {"type": "auth", "in": 2000},
    ]
    assert harness.closes == []
    await asyncio.sleep(1.5)
    assert harness.closes == [(18.5, 4401)]


@virtually
async def test_renewal_during_validation_is_ignored() -> None:
    """A credential that arrives during a validation is ignored, because each validation calls the application."""
    harness = ExpiryHarness()
    for credential in ("one", "two", None):
        harness.term.request_renewal(harness, credential)
    assert harness.validated == ["one"]
    harness.term.renewed(harness, None)
    harness.term.request_renewal(harness, "three")
    assert harness.validated == ["one", "three"]


@virtually
async def test_renewal_without_validator_keeps_old_expiry() -> None:
    """The old expiry stays, and the client gets an error: it cannot renew its credential."""
    harness = ExpiryHarness()
    harness.term.reset(harness, 10.0)
    harness.term.request_renewal(harness, "new")
    harness.term.renewal_rejected(harness, "credential renewal is not supported")
    assert harness.sent[0][1]["code"] == "auth_refused"
    await asyncio.sleep(11)
    assert harness.closes == [(10.0, 4401)]


@virtually
async def test_renewal_accepted_after_close_sends_nothing() -> None:
    """After the close nothing is sent, and no timer is left."""
    harness = ExpiryHarness()
    harness.term.reset(harness, 1.0)
    harness.term.request_renewal(harness, "new")
    await asyncio.sleep(2)
    before = len(harness.sent)
    harness.term.renewed(harness, 1.0)
    await asyncio.sleep(10)
    assert len(harness.sent) == before
    assert harness.closes == [(1.0, 4401)]


@pytest.mark.parametrize(
    ("message", "token"),
    [
        ('{"type":"auth","token":"x"}', "x"),
        (' {"token": "a b", "type": "auth"} ', "a b"),
        ('{"type":"auth","token":""}', ""),
        ('{"type":"auth"}', None),
        ('{"type":"auth","token":7}', None),
        ('{"type":"auth","token":"x","more":1}', None),
        ('{"type":"chat","token":"auth"}', None),
        ('["auth"]', None),
        ('"auth"', None),
        ('{"type":"auth","token":NaN}', None),
        ('{"type":"auth","token":"\\ud800"}', None),
        ('"auth"' + "[" * 5000, None),
        ("auth", None),
        (b'{"type":"auth","token":"x"}', None),
        ('{"type":"auth","token":"' + "x" * MAX_RENEWAL_CHARS + '"}', None),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_plain_client_renewal_requires_exact_object_shape(message: str | bytes, token: str | None) -> None:
    """Only an object of exactly that shape is a renewal; everything else is data of the application."""
    assert parse_renewal(message) == token


def test_longest_credential_can_be_renewed() -> None:
    """The longest credential that a handshake accepts can be renewed too."""
    token = "x" * 8192
    assert parse_renewal(f'{{"type":"auth","token":"{token}"}}') == token


@pytest.mark.parametrize(("seconds", "expected"), [(0.0, 1), (0.0001, 1), (1.0, 1000), (1.2345, 1234)])
def test_durations_are_sent_as_at_least_one_millisecond(seconds: float, expected: int) -> None:
    """Durations are sent as at least 1 ms."""
    assert to_milliseconds(seconds) == expected


@virtually
async def test_on_auth_without_expiry_keeps_identity_expiry() -> None:
    """An `on_auth` that returns nothing leaves `expires_at` unchanged; only a new time moves it."""
    harness = ExpiryHarness()
    harness.term.start(harness, None, 10.0)
    harness.term.request_renewal(harness, "new")
    harness.term.renewed(harness, None)
    assert harness.sent[-1][1]["code"] == "auth_refused"
    await asyncio.sleep(11)
    assert harness.closes == [(10.0, 4401)]


@virtually
async def test_earlier_of_on_auth_and_identity_expiry_applies() -> None:
    """The earlier of the times of `on_auth` and of the identity is the expiry."""
    harness = ExpiryHarness()
    harness.term.start(harness, 5.0, 10.0)
    await asyncio.sleep(6)
    assert harness.closes == [(5.0, 4401)]
