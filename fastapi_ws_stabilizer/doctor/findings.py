"""Results of the doctor's checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Severity = Literal["error", "warning"]
"""Severity of a finding. An error certainly costs connections or blocks a deploy. A warning does so only in the worst
case."""

ERROR: Final = "error"
WARNING: Final = "warning"


@dataclass(frozen=True)
class Problem:
    """Problem that one check has found in a deployment.

    Attributes:
        what: What is wrong, with the relevant numbers.
        advice: What to do about it.
        severity: Severity in this deployment, if it differs from the check's.
    """

    what: str
    advice: str
    severity: Severity | None = None


@dataclass(frozen=True)
class Finding:
    """Problem together with its check.

    Attributes:
        code: `D01` to `D24`, stable.
        severity: `"error"` or `"warning"`.
        title: The broken rule, the same for every finding of this code.
        problem: What is wrong, with the relevant numbers.
        advice: What to do about it.
    """

    code: str
    severity: Severity
    title: str
    problem: str
    advice: str
