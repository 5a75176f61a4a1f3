"""What the fakes of a connection share: a list as the outbox, and a close without a socket."""

from __future__ import annotations

from fastapi_ws_stabilizer.close_codes import CloseInfo, DisconnectReason, local_close
from fastapi_ws_stabilizer.wire.encoded import EncodedMessage


class FakeOutbox:
    """An outbox that sends nothing.

    Attributes:
        frames: Frames that were queued.
        pressed: Whether it is backpressured.
        close_info: How it was closed.
    """

    def __init__(self, *, pressed: bool = False) -> None:
        self.frames: list[EncodedMessage] = []
        self.pressed = pressed
        self.close_info: CloseInfo | None = None

    def flush(self) -> None:
        """Do nothing: no frame waits here."""

    def has_sendable_frames(self) -> bool:
        """Return `False`: no frame waits here."""
        return False

    def is_backpressured(self) -> bool:
        """Return whether it is backpressured."""
        return self.pressed

    def close(
        self,
        cause: DisconnectReason,
        *,
        code: int | None = None,
        reason: str | None = None,
        from_outside: bool = False,
    ) -> bool:
        """Begin to close."""
        if self.close_info is not None:
            return False
        self.close_info = local_close(cause, code=code, reason=reason, from_outside=from_outside)
        return True
