"""Checks of the options of a client, so that a wrong one raises where it is written."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from typing import Final

OTHER_NAMES: Final[Mapping[str, str]] = {
    "headers": "additional_headers",
    "extra_headers": "additional_headers",
    "token": "auth",
    "credential": "auth",
    "timeout": "connect_timeout",
}
"""Names that other libraries use, and the option that they mean here."""


def check_option_names(given: Iterable[str], valid: Collection[str], *, of: str) -> None:
    """Check the names of options.

    Args:
        given: The names.
        valid: All valid names.
        of: What has these options, for the text of the error.

    Raises:
        TypeError: A name is not valid. The error has the nearest valid name.
    """
    for name in given:
        if name not in valid:
            nearest = [OTHER_NAMES[name]] if name in OTHER_NAMES else difflib.get_close_matches(name, valid, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest and nearest[0] in valid else ""
            raise TypeError(f"{of} has no option {name!r}{hint}")


def check_positive(**options: object) -> None:
    """Check that options are numbers above 0.

    Raises:
        ValueError: One of them is not.
    """
    for name, value in options.items():
        if not (isinstance(value, (int, float)) and value > 0):
            raise ValueError(f"{name} must be a number above 0, not {value!r}")


def check_not_negative(**options: object) -> None:
    """Check that options are numbers of at least 0.

    Raises:
        ValueError: One of them is not.
    """
    for name, value in options.items():
        if not (isinstance(value, (int, float)) and value >= 0):
            raise ValueError(f"{name} must be a number of at least 0, not {value!r}")
