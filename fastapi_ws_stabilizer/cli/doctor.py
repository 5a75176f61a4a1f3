"""`doctor module:app`: check the options, the server and the platform of an app, and print the findings."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from typing import Any

from fastapi_ws_stabilizer.cli.output import exit_with_error
from fastapi_ws_stabilizer.dependencies import manager_of_app
from fastapi_ws_stabilizer.doctor.findings import ERROR
from fastapi_ws_stabilizer.doctor.output import write_findings
from fastapi_ws_stabilizer.doctor.servers import SERVERS
from fastapi_ws_stabilizer.manager import WebSocketConnectionManager


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.set_defaults(run=_run)
    parser.add_argument("app", metavar="module:app", nargs="?", help="the app, named as for its server")
    parser.add_argument("--server", default="uvicorn", choices=sorted(SERVERS), help="default: uvicorn")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a server option that you set, such as timeout_graceful_shutdown=30; all others have their defaults",
    )
    parser.add_argument("--uvicorn-options", action="store_true", help="the server runs with manager.uvicorn_options()")
    parser.add_argument(
        "--platform",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="the platforms in front of the server, separated by spaces or commas",
    )
    seconds: dict[str, Any] = {"type": float, "metavar": "SECONDS"}
    parser.add_argument(
        "--idle-timeout", **seconds, help="shortest idle timeout on the path, if you changed the default"
    )
    parser.add_argument("--max-lifetime", **seconds, help="shortest lifetime on the path, if you changed the default")
    parser.add_argument("--grace", **seconds, help="time from SIGTERM to SIGKILL, if you changed the default")
    parser.add_argument("--pre-stop", **seconds, default=0.0, help="duration of the preStop hook (default: 0)")
    parser.add_argument("--http2", action="store_true", help="every hop to the server speaks HTTP/2")
    parser.add_argument("--caching", action="store_true", help="the platform caches the WebSocket route")
    parser.add_argument(
        "--ignore", nargs="+", action="extend", default=[], metavar="CODE", help="findings to leave out, such as D12"
    )


def _run(args: argparse.Namespace) -> int:
    try:
        app, manager = _load(_app_of(args))
        options = manager.uvicorn_options() if args.uvicorn_options else {}
        findings = manager.check(
            app,
            server=args.server,
            server_options={**options, **dict(_option(text) for text in args.option)},
            platform=[name for word in args.platform for name in word.split(",") if name],
            idle_timeout=args.idle_timeout,
            max_lifetime=args.max_lifetime,
            grace=args.grace,
            pre_stop=args.pre_stop,
            http2=args.http2,
            caching=args.caching,
        )
    except ValueError as error:
        return exit_with_error(str(error), code=2)
    ignored = {code.upper() for code in args.ignore}
    findings = [finding for finding in findings if finding.code not in ignored]
    write_findings(findings, sys.stdout)
    return 1 if any(finding.severity == ERROR for finding in findings) else 0


def _app_of(args: argparse.Namespace) -> str:
    """Return the name of the app.

    An option that takes several words may have taken the app as its last word.
    """
    if args.app is not None:
        return str(args.app)
    for words in (args.platform, args.ignore):
        if words and ":" in words[-1]:
            return str(words.pop())
    raise ValueError("name the app as for a server, such as main:app")


def _load(path: str) -> tuple[Any, WebSocketConnectionManager]:
    """Import an app and find its manager: the app's own, or the only manager of its module."""
    name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # includes SystemExit: an app that exits with 0 must not pass the checks
        raise ValueError(f"cannot import {name!r}: {type(error).__name__}: {error}") from error
    app: Any = module
    for part in (attribute or "app").split("."):
        app = getattr(app, part, None)
    if not hasattr(app, "routes"):
        raise ValueError(f"{path} is not an app: name it as for a server, such as main:app")
    managers = {value for value in vars(module).values() if isinstance(value, WebSocketConnectionManager)}
    manager = manager_of_app(app) or (managers.pop() if len(managers) == 1 else None)
    if manager is None:
        raise ValueError(f"{path} has no manager: use FastAPI(lifespan=manager.lifespan) or manager.install(app)")
    return app, manager


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--option must be NAME=VALUE, not {text!r}")
    try:
        return name, None if value.lower() == "none" else json.loads(value.lower())
    except ValueError:
        return name, value
