"""Tests of the errors of a client."""

from __future__ import annotations

import pytest

from fastapi_ws_stabilizer.client import (
    BufferFullError,
    ClientClosedError,
    ClientError,
    HttpRejection,
    MessageTooLargeError,
    SessionLostError,
)
from fastapi_ws_stabilizer.errors import WebSocketStabilizerError


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ClientClosedError(4410, "kicked"), "the client is permanently closed: code 4410 (kicked)"),
        (ClientClosedError(1000), "the client is permanently closed: code 1000"),
        (
            ClientClosedError(4403, "HTTP 403", HttpRejection(403, '{"detail":"no such room"}')),
            'the client is permanently closed: code 4403 (HTTP 403; the server says: {"detail":"no such room"})',
        ),
        (
            ClientClosedError(4404, "HTTP 404", HttpRejection(404, "")),
            "the client is permanently closed: code 4404 (HTTP 404)",
        ),
        (SessionLostError(), "the session is lost, and it is unknown whether the server has handled this message"),
        (BufferFullError(), "the send buffer is full: "),
        (MessageTooLargeError(12, 10), "the message has 12 bytes, but the server accepts 10"),
    ],
)
def test_client_errors_have_base_class_and_sentence(error: ClientError, text: str) -> None:
    """Each error is derived from the library's base class, and its text is a sentence."""
    assert isinstance(error, WebSocketStabilizerError)
    assert str(error).startswith(text)
