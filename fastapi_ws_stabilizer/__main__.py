"""`python -m fastapi_ws_stabilizer`: `doctor module:app` checks a deployment, `drain URL` asks a server to drain."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any, Final

from fastapi_ws_stabilizer.dependencies import manager_of
from fastapi_ws_stabilizer.doctor.findings import ERROR
from fastapi_ws_stabilizer.doctor.servers import SERVERS
from fastapi_ws_stabilizer.doctor.table import write_findings
from fastapi_ws_stabilizer.manager import WebSocketConnectionManager

MARGIN: Final = 5.0
"""Seconds beyond the drain's own time that an answer is waited for."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fastapi_ws_stabilizer", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_drain(commands.add_parser("drain", help="let a server's clients come back elsewhere, and wait for it"))
    _add_doctor(commands.add_parser("doctor", help="look for options, server and platform that do not go together"))
    asked = parser.parse_args(arguments)
    code: int = asked.run(asked)
    return code


# ── drain ──


def _add_drain(drain: argparse.ArgumentParser) -> None:
    drain.set_defaults(run=_run_drain)
    drain.add_argument("url", help="where its stats router is mounted, such as http://127.0.0.1:8000/ws-stats")
    drain.add_argument("--timeout", type=float, default=30.0, help="seconds that it may take (default: 30)")
    drain.add_argument(
        "--secret-env",
        default="WS_DRAIN_SECRET",
        metavar="NAME",
        help="the environment variable that holds drain_secret (default: WS_DRAIN_SECRET)",
    )


def _run_drain(asked: argparse.Namespace) -> int:
    secret = os.environ.get(asked.secret_env, "")
    if not secret:
        print(f"no secret: set {asked.secret_env} to the server's drain_secret", file=sys.stderr)
        return 2
    return _drain(asked.url, asked.timeout, secret)


def _drain(url: str, timeout: float, secret: str) -> int:
    if not url.startswith(("http://", "https://")):
        print(f"not an http(s) URL: {url}", file=sys.stderr)
        return 2
    request = urllib.request.Request(  # noqa: S310 (looked at above)
        f"{url.rstrip('/')}/drain?timeout={timeout}", method="POST", headers={"Authorization": f"Bearer {secret}"}
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout + MARGIN) as response:  # noqa: S310
            report = json.load(response)
    except urllib.error.HTTPError as refusal:
        print(f"refused: HTTP {refusal.code} {refusal.read(1000).decode(errors='replace')}", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print(f"no answer: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report))
    return 1 if report["failed_count"] else 0


# ── doctor ──


def _add_doctor(doctor: argparse.ArgumentParser) -> None:
    doctor.set_defaults(run=_run_doctor)
    doctor.add_argument("app", metavar="module:app", help="the app as its server is told it")
    doctor.add_argument("--server", default="uvicorn", choices=sorted(SERVERS), help="default: uvicorn")
    doctor.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option that the server is given, such as timeout_graceful_shutdown=30; others have their defaults",
    )
    doctor.add_argument(
        "--uvicorn-options", action="store_true", help="the server is run with manager.uvicorn_options()"
    )
    doctor.add_argument(
        "--platform", nargs="+", action="extend", default=[], metavar="NAME", help="what stands before the server"
    )
    seconds: dict[str, Any] = {"type": float, "metavar": "SECONDS"}
    doctor.add_argument("--idle-timeout", **seconds, help="the shortest on the way, if the default was changed")
    doctor.add_argument("--max-lifetime", **seconds, help="the shortest on the way, if the default was changed")
    doctor.add_argument("--grace", **seconds, help="between SIGTERM and SIGKILL, if the default was changed")
    doctor.add_argument("--pre-stop", **seconds, default=0.0, help="that a preStop hook takes")
    doctor.add_argument("--http2", action="store_true", help="HTTP/2 is spoken all the way to the server")
    doctor.add_argument("--caching", action="store_true", help="the platform caches the WebSocket route")
    doctor.add_argument(
        "--ignore", nargs="+", action="extend", default=[], metavar="CODE", help="findings that are left out: D12"
    )


def _run_doctor(asked: argparse.Namespace) -> int:
    try:
        app, manager = _load(asked.app)
        options = manager.uvicorn_options() if asked.uvicorn_options else {}
        findings = manager.check(
            app,
            server=asked.server,
            server_options={**options, **dict(_option(text) for text in asked.option)},
            platform=asked.platform,
            idle_timeout=asked.idle_timeout,
            max_lifetime=asked.max_lifetime,
            grace=asked.grace,
            pre_stop=asked.pre_stop,
            http2=asked.http2,
            caching=asked.caching,
        )
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    ignored = {code.upper() for code in asked.ignore}
    findings = [finding for finding in findings if finding.code not in ignored]
    write_findings(findings, sys.stdout)
    return 1 if any(finding.severity == ERROR for finding in findings) else 0


def _load(place: str) -> tuple[Any, WebSocketConnectionManager]:
    """Import an app, and find its manager: the one that it shows, or the only one that its module has."""
    name, _, attribute = place.partition(":")
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"cannot import {name!r}: {error}") from error
    app: Any = module
    for part in (attribute or "app").split("."):
        app = getattr(app, part, None)
    if not hasattr(app, "routes"):
        raise ValueError(f"{place} is no app: name it as for a server, such as main:app")
    managers = {value for value in vars(module).values() if isinstance(value, WebSocketConnectionManager)}
    manager = manager_of(app) or (managers.pop() if len(managers) == 1 else None)
    if manager is None:
        raise ValueError(f"{place} shows no manager: use FastAPI(lifespan=manager.lifespan) or manager.install(app)")
    return app, manager


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--option is NAME=VALUE, not {text!r}")
    try:
        return name, None if value.lower() == "none" else json.loads(value.lower())
    except ValueError:
        return name, value


if __name__ == "__main__":
    sys.exit(main())
