"""Tests of opening a WebSocket."""

from __future__ import annotations

import sys

import pytest

from fastapi_ws_stabilizer.client.transport import TransportClosedError, default_connector


def test_missing_websockets_error_names_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extra installed, the error names it."""
    monkeypatch.delitem(sys.modules, "fastapi_ws_stabilizer.client.websockets_transport", raising=False)
    monkeypatch.setitem(sys.modules, "websockets.asyncio.client", None)
    with pytest.raises(ImportError, match=r"pip install .*\[client\]"):
        default_connector({})


def test_transport_closed_error_has_code_and_reason() -> None:
    """The code and the reason are attributes, and part of the text."""
    lost = TransportClosedError(4503, "draining")
    assert (lost.code, lost.reason) == (4503, "draining")
    assert "4503" in str(lost)
