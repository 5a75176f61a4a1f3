"""`Finding`: what a check of the doctor has to say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Severity = Literal["error", "warning"]
"""How bad a finding is: an error costs connections or blocks a deploy for certain, a warning in the worst case."""

ERROR: Final = "error"
WARNING: Final = "warning"


@dataclass(frozen=True)
class Problem:
    """What one check has found in these surroundings.

    Attributes:
        what: What is wrong, with the numbers that make it so.
        advice: What to do about it.
        severity: How bad it is here, where that is not what the check says.
    """

    what: str
    advice: str
    severity: Severity | None = None


@dataclass(frozen=True)
class Finding:
    """A problem, and the check that has found it.

    Attributes:
        code: `D01` to `D23`, stable.
        severity: `"error"` or `"warning"`.
        title: The rule that is broken, the same for every finding of this code.
        problem: What is wrong, with the numbers that make it so.
        advice: What to do about it.
    """

    code: str
    severity: Severity
    title: str
    problem: str
    advice: str
