"""Text output of findings: a table if `rich` is installed, otherwise plain lines."""

from __future__ import annotations

import importlib
import textwrap
from collections.abc import Sequence
from typing import Final, TextIO

from fastapi_ws_stabilizer.doctor.findings import ERROR, Finding

RICH: Final = "fastapi_ws_stabilizer.doctor.rich_table"

WIDTH: Final = 100
"""Line width of plain text, in columns."""


def write_findings(findings: Sequence[Finding], out: TextIO) -> None:
    """Write the findings, and a last line with their number."""
    if findings:
        try:
            module = importlib.import_module(RICH)  # rich is optional
        except ImportError:
            out.write(plain(findings))
        else:
            module.write_table(findings, out)
    out.write(f"{summary(findings)}\n")


def summary(findings: Sequence[Finding]) -> str:
    """Return the number of findings as text."""
    if not findings:
        return "nothing found"
    errors = sum(finding.severity == ERROR for finding in findings)
    return f"errors: {errors}, warnings: {len(findings) - errors}"


def plain(findings: Sequence[Finding]) -> str:
    """Return the findings as plain text, one paragraph each."""
    return "".join(_paragraph(finding) for finding in findings)


def _paragraph(finding: Finding) -> str:
    lines = [f"{finding.code} {finding.severity}: {finding.title}"]
    for text in (finding.problem, f"-> {finding.advice}"):
        lines += textwrap.wrap(text, WIDTH, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines) + "\n\n"
