"""Output of findings as a table of `rich`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastapi_ws_stabilizer.doctor.findings import Finding

COLOURS: Final = {"error": "bold red", "warning": "yellow"}


def write_table(findings: Sequence[Finding], out: TextIO) -> None:
    """Write the findings as a table, in colour if `out` is a terminal."""
    table = Table("Check", "What is wrong", "What to do", show_lines=True)
    for finding in findings:
        colour = COLOURS[finding.severity]
        table.add_row(
            f"[{colour}]{finding.code}\n{finding.severity}[/]",
            f"[bold]{escape(finding.title)}[/]\n{escape(finding.problem)}",
            escape(finding.advice),
        )
    Console(file=out).print(table)
