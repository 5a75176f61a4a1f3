"""Tests of the server that a client connects to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from fastapi_ws_stabilizer.client.target import Target
from fastapi_ws_stabilizer.wire.v1.frames import SUBPROTOCOL
from tests.support.fake_link import FakeLink


async def url() -> str:
    """Return a URL."""
    return "ws://from-a-function"


@pytest.mark.parametrize(
    ("given", "dialled"), [("ws://a", "ws://a"), (lambda: "ws://b", "ws://b"), (url, "ws://from-a-function")]
)
async def test_dial_resolves_url(given: Any, dialled: str) -> None:
    """The URL may be a string, a function or an async function, and the client offers one subprotocol."""
    offers: list[tuple[str, list[str]]] = []

    async def dial(url: str, subprotocols: Sequence[str]) -> FakeLink:
        offers.append((url, list(subprotocols)))
        return FakeLink(SUBPROTOCOL)

    await Target(given, None, dial).dial()
    assert offers == [(dialled, [SUBPROTOCOL])]


@pytest.mark.parametrize("given", [None, 7, b"ws://a"])
def test_invalid_url_raises(given: Any) -> None:
    """What is neither a string nor a function raises at once."""
    with pytest.raises(TypeError, match="url must be a string such as"):
        Target(given, None, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("wss://me:secret@example.com/ws/ann?token=secret#secret", "wss://example.com/ws/ann"),
        ("ws://example.com", "ws://example.com"),
        (url, "the server"),
    ],
)
def test_text_of_target_contains_no_secret(given: Any, shown: str) -> None:
    """The text for logs has no user, password, query or fragment."""
    assert str(Target(given, None, None)) == shown  # type: ignore[arg-type]


async def async_credential(force: bool = False) -> str:
    """Return a credential."""
    return "forced" if force else "first"


@pytest.mark.parametrize(
    ("auth", "first", "forced"),
    [
        (None, None, None),
        (lambda: 7, "7", "7"),
        (lambda: None, None, None),
        (async_credential, "first", "forced"),
        (lambda **options: str(options), "{'force': False}", "{'force': True}"),
        (dict, "{}", "{}"),
    ],
    ids=["none", "int", "empty", "async", "kwargs", "no signature"],
)
async def test_credential_passes_force_if_accepted(auth: Any, first: str | None, forced: str | None) -> None:
    """The credential is text or `None`, and the function gets `force` if it has that parameter."""
    target = Target("ws://a", auth, None)  # type: ignore[arg-type]
    assert target.can_reauthenticate == (auth is not None)
    assert await target.credential(force=False) == first
    assert await target.credential(force=True) == forced
