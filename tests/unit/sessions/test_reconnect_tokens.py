"""Tests of the registry of reconnect tokens."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from fastapi_ws_stabilizer.auth.signed_tokens import RECONNECT_TOKEN, SignedTokens
from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.errors import InvalidTokenError
from fastapi_ws_stabilizer.events import EventBus
from fastapi_ws_stabilizer.sessions import reconnect_tokens as module
from fastapi_ws_stabilizer.sessions.detached import key_of_connection
from fastapi_ws_stabilizer.sessions.reconnect_tokens import ReconnectTokenRegistry


class Clock:
    """Clock that a test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(module, "monotonic", lambda: self.now)


def create_registry(**options: Any) -> ReconnectTokenRegistry:
    """Create a registry whose tokens are valid for an hour."""
    config = WebSocketConfig(**{"reconnect_token_ttl": timedelta(hours=1), **options})
    return ReconnectTokenRegistry(config, EventBus(), SignedTokens(RECONNECT_TOKEN, (), 3600.0))


def resumable(registry: ReconnectTokenRegistry, *client_ids: str) -> list[bool]:
    """Return for each client whether its state would be saved."""
    return [registry.resumable_key_of(client_id, "c1") is not None for client_id in client_ids]


def test_only_client_with_token_is_resumable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client is resumable if it has a token; above the limit, the first client loses that."""
    monkeypatch.setattr(module, "MAX_TOKENS", 2)
    registry = create_registry()
    assert resumable(registry, "ann") == [False]
    for client_id in ("ann", "bob", "ann", "cid"):
        registry.issue(client_id, None)
    assert resumable(registry, "ann", "bob", "cid") == [True, False, True]


def test_client_is_resumable_until_token_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client with an expired token is not resumable, and the registry forgets it."""
    clock, registry = Clock(monkeypatch), create_registry()
    registry.issue("ann", None)
    clock.now += 1800
    registry.issue("bob", None)
    clock.now += 1801
    assert resumable(registry, "ann", "bob") == [False, True]
    registry.expire()
    assert list(registry._expected) == ["bob"]


def test_used_token_leaves_client_resumable() -> None:
    """A client that has used its token holds the next one soon, and may have it already."""
    registry = create_registry()
    token = registry.issue("ann", None)
    assert registry.consume_for("c1", token, "ann")
    assert resumable(registry, "ann") == [True]


def test_disabled_reconnect_issues_no_token() -> None:
    """Without `enable_reconnect`, no token is issued and none is verified."""
    registry = create_registry(enable_reconnect=False)
    with pytest.raises(InvalidTokenError):
        registry.issue("ann", None)
    assert registry.verify(create_registry().issue("ann", None), "ann") is None
    assert resumable(registry, "ann") == [False]


def test_each_connection_has_own_key_with_duplicates() -> None:
    """With `on_duplicate="allow"` each connection has its own key; otherwise the key is the client id."""
    assert create_registry().key_of("ann", "c1") == "ann"
    assert create_registry(on_duplicate="allow").key_of("ann", "c1") == key_of_connection("ann", "c1")


def test_used_token_gives_connection_the_key_that_it_names() -> None:
    """The connection that uses a token continues under the key of the connection that the token is for."""
    registry = create_registry(on_duplicate="allow")
    token = registry.issue("ann", "c1")
    assert registry.consume_for("c2", token, "ann")
    assert registry.key_of("ann", "c2") == key_of_connection("ann", "c1")
    assert registry.take_inherited("c2") == key_of_connection("ann", "c1")
    assert registry.take_inherited("c2") is None


def test_second_use_of_token_is_refused() -> None:
    """A token is valid once."""
    registry = create_registry()
    token = registry.issue("ann", None)
    assert registry.consume_for("c1", token, "ann")
    assert not registry.consume_for("c2", token, "ann")


def test_forgotten_client_is_not_resumable() -> None:
    """After `forget`, no earlier token makes a client resumable."""
    registry = create_registry()
    registry.issue("ann", None)
    registry.forget("ann", [])
    assert resumable(registry, "ann") == [False]
