"""Command line: `doctor module:app` checks a deployment, `drain URL` drains a running server."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Final

from fastapi_ws_stabilizer.cli import doctor, drain

DESCRIPTION: Final = "Check a deployment, or drain a running server."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m fastapi_ws_stabilizer", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True)
    drain.configure(commands.add_parser("drain", help="drain a running server and wait for its report"))
    doctor.configure(commands.add_parser("doctor", help="check that the options, the server and the platform agree"))
    args = parser.parse_args(arguments)
    code: int = args.run(args)
    return code
