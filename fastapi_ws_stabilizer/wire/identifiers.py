"""What a client may be called, and what it may call rooms, events, messages and keys."""

from __future__ import annotations

import re
from typing import Final

MAX_NAME_CHARS: Final = 256
"""Longest client id, room, event, message id or idempotency key."""

MAX_CODE_CHARS: Final = 64
"""Longest code of an error."""

MAX_TEXT_CHARS: Final = 1024
"""Longest sentence of an error."""

NAME_RULE: Final = f"at most {MAX_NAME_CHARS} characters, none of them a control character"
"""The rule, for those who have broken it."""

_CONTROL: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""What ends or rewrites a line, and halves of surrogate pairs, which cannot be sent. Not all that is unprintable: a
family emoji is held together by characters that nobody sees."""


def sendable(text: object, most: int) -> str:
    """A text that can be sent, of at most so many characters: halves of surrogate pairs become question marks."""
    return str(text)[:most].encode("utf-8", "replace").decode("utf-8")


def is_name(text: str) -> bool:
    """Whether a text may be a name: it is no longer than `MAX_NAME_CHARS` and has no control character."""
    return len(text) <= MAX_NAME_CHARS and (text.isprintable() or _CONTROL.search(text) is None)


def check_client_id(client_id: object) -> None:
    """Raise unless a client can be called so.

    Raises:
        ValueError: It is empty, no `str`, or breaks the rule for names. The error says what to do.
    """
    if not isinstance(client_id, str) or not client_id:
        raise ValueError(f"client_id must be a str that is not empty, not {client_id!r}")
    if not is_name(client_id):
        raise ValueError(
            f"client_id must have {NAME_RULE}, and {client_id[:40]!r} of {len(client_id)} characters is not that: use "
            "another key of this client, or a hash of the name"
        )
