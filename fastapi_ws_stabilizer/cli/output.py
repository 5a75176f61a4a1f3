"""Error output that all commands share."""

from __future__ import annotations

import sys


def exit_with_error(text: str, secret: str = "", *, code: int = 1) -> int:
    """Print an error as one line on standard error and return the exit code.

    Args:
        text: The error.
        secret: Replaced by `***` in the text, because a server may send back the secret that it received.
        code: The exit code.
    """
    print(" ".join((text.replace(secret, "***") if secret else text).split()), file=sys.stderr)
    return code
