"""Tests of how a WebSocket is dialled."""

from __future__ import annotations

import sys

import pytest

from fastapi_ws_stabilizer.client.transport import TransportClosedError, default_connector


def test_without_the_library_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has not installed the extra is told its name."""
    monkeypatch.delitem(sys.modules, "fastapi_ws_stabilizer.client.websockets_transport", raising=False)
    monkeypatch.setitem(sys.modules, "websockets.asyncio.client", None)
    with pytest.raises(ImportError, match=r"pip install .*\[client\]"):
        default_connector()


def test_a_lost_transport_knows_its_code() -> None:
    """The code and the reason are attributes, and in the text."""
    lost = TransportClosedError(4503, "draining")
    assert (lost.code, lost.reason) == (4503, "draining")
    assert "4503" in str(lost)
