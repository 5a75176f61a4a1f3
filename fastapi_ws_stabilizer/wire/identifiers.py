"""Rules for client ids and for names: rooms, events, message ids and keys."""

from __future__ import annotations

import re
from typing import Final

MAX_NAME_CHARS: Final = 256
"""Maximum length of a client id, room, event, message id or idempotency key, in characters."""

MAX_CODE_CHARS: Final = 64
"""Maximum length of an error code, in characters."""

MAX_TEXT_CHARS: Final = 1024
"""Maximum length of an error message, in characters."""

NAME_RULE: Final = f"at most {MAX_NAME_CHARS} characters and no control characters"
"""The rule as a phrase for error messages."""

_CONTROL: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Characters that end or rewrite a line, and lone surrogates, which cannot be sent. Other unprintable characters are
allowed, because some emoji contain invisible joiners."""


def sendable(text: object, max_chars: int) -> str:
    """Return at most `max_chars` characters of a text. Lone surrogates become question marks."""
    return str(text)[:max_chars].encode("utf-8", "replace").decode("utf-8")


def is_name(text: str) -> bool:
    """Return whether a text is a valid name: at most `MAX_NAME_CHARS` and no control characters."""
    return len(text) <= MAX_NAME_CHARS and (text.isprintable() or _CONTROL.search(text) is None)


def check_client_id(client_id: object) -> None:
    """Raise if a client id is invalid.

    Raises:
        ValueError: The id is empty, not a `str`, or violates the rule for names. The error says what to do.
    """
    if not isinstance(client_id, str) or not client_id:
        raise ValueError(f"client_id must be a non-empty str, not {client_id!r}")
    if not is_name(client_id):
        too_long = len(client_id) > MAX_NAME_CHARS
        problem = (
            f"has {len(client_id)} characters"
            if too_long
            else "contains a control character, a line separator or a lone surrogate"
        )
        raise ValueError(
            f"client_id {client_id[:40]!r} {problem}. A client id has {NAME_RULE}: use another id, or a hash "
            "of this one"
        )
