"""`python -m fastapi_ws_stabilizer`: `doctor module:app` checks a deployment, `drain URL` asks a server to drain."""

from __future__ import annotations

import argparse
import http.client
import importlib
import json
import os
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import Any, Final

from fastapi_ws_stabilizer.dependencies import manager_of_app
from fastapi_ws_stabilizer.doctor.findings import ERROR
from fastapi_ws_stabilizer.doctor.servers import SERVERS
from fastapi_ws_stabilizer.doctor.table import write_findings
from fastapi_ws_stabilizer.manager import WebSocketConnectionManager

MARGIN: Final = 5.0
"""Seconds beyond the drain's own time that an answer is waited for."""

LONGEST: Final = 3600.0
"""The most seconds that the stats router lets a drain take."""

MAX_ANSWER: Final = 65536
"""Bytes of an answer that are read. A report has some two hundred."""

EXCERPT: Final = 300
"""Characters that are shown of an answer which is no report."""


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
    secret = os.environ.get(asked.secret_env, "").strip()  # one that was read from a file ends with a newline
    if not secret:
        return _exit_with_error(f"no secret: set {asked.secret_env} to the server's drain_secret", code=2)
    if not secret.isprintable() or max(secret) > "\xff":
        return _exit_with_error(f"{asked.secret_env} holds a character that no header can carry", code=2)
    if not 0 < asked.timeout <= LONGEST:
        return _exit_with_error(
            f"--timeout is a number of seconds above zero, {LONGEST:g} at most, not {asked.timeout:g}", code=2
        )
    if not _is_valid_url(asked.url):
        return _exit_with_error(f"not an http(s) URL of a stats router: {asked.url}", code=2)
    return _drain(asked.url, asked.timeout, secret)


def _is_valid_url(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        is_whole = bool(parts.hostname) and parts.port != 0  # reading a port that is none raises
    except ValueError:
        return False
    # What comes after `?` or before `@` would make another address of it.
    plain = url.isascii() and url.isprintable() and not any(character in url for character in " ?#@")
    return is_whole and plain and parts.scheme in ("http", "https")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows none: the secret is for the server that was named."""

    def redirect_request(self, *_: Any) -> None:
        """Let the redirect be an error, as any other refusal."""


def _drain(url: str, timeout: float, secret: str) -> int:
    request = urllib.request.Request(  # noqa: S310 (the URL was looked at)
        f"{url.rstrip('/')}/drain?timeout={timeout}", method="POST", headers={"Authorization": f"Bearer {secret}"}
    )
    # A proxy of the environment is for the world outside, and need not see the secret.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)
    try:
        with opener.open(request, timeout=timeout + MARGIN) as response:
            answer = response.read(MAX_ANSWER)
    except urllib.error.HTTPError as refusal:
        return _exit_with_error(_describe_http_error(refusal, secret), secret)
    except (http.client.InvalidURL, UnicodeError):
        return _exit_with_error(f"not an http(s) URL of a stats router: {url}", secret, code=2)
    except (OSError, ValueError, http.client.HTTPException) as error:
        return _exit_with_error(f"no answer: {str(error) or type(error).__name__}", secret)
    try:
        report = json.loads(answer)
    except (ValueError, RecursionError):
        report = None
    if not isinstance(report, dict) or type(report.get("failed_count")) is not int:
        return _exit_with_error(f"no report of a drain: {_truncate(answer, secret)}")
    print(json.dumps(report))
    return 1 if report["failed_count"] else 0


def _describe_http_error(refusal: urllib.error.HTTPError, secret: str) -> str:
    with refusal:
        if 300 <= refusal.code < 400:
            return f"redirected: HTTP {refusal.code} to {refusal.headers.get('Location')}, which is not followed"
        try:
            said = _truncate(refusal.read(MAX_ANSWER), secret)
        except (OSError, http.client.HTTPException):
            said = "and no more than that"
    return f"refused: HTTP {refusal.code} {said}"


def _exit_with_error(text: str, secret: str = "", *, code: int = 1) -> int:
    """Say in one line what is wrong; return the exit code. A server may send back the secret that it got: not here."""
    print(" ".join((text.replace(secret, "***") if secret else text).split()), file=sys.stderr)
    return code


def _truncate(body: bytes, secret: str) -> str:
    """The beginning of a text; cut after the secret was taken out, for else a part of it could stay."""
    return body.decode(errors="replace").replace(secret, "***")[:EXCERPT]


# ── doctor ──


def _add_doctor(doctor: argparse.ArgumentParser) -> None:
    doctor.set_defaults(run=_run_doctor)
    doctor.add_argument("app", metavar="module:app", nargs="?", help="the app as its server is told it")
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
        "--platform",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="what stands before the server, separated by blanks or commas",
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
        app, manager = _load(_app_of(asked))
        options = manager.uvicorn_options() if asked.uvicorn_options else {}
        findings = manager.check(
            app,
            server=asked.server,
            server_options={**options, **dict(_option(text) for text in asked.option)},
            platform=[name for word in asked.platform for name in word.split(",") if name],
            idle_timeout=asked.idle_timeout,
            max_lifetime=asked.max_lifetime,
            grace=asked.grace,
            pre_stop=asked.pre_stop,
            http2=asked.http2,
            caching=asked.caching,
        )
    except ValueError as error:
        return _exit_with_error(str(error), code=2)
    ignored = {code.upper() for code in asked.ignore}
    findings = [finding for finding in findings if finding.code not in ignored]
    write_findings(findings, sys.stdout)
    return 1 if any(finding.severity == ERROR for finding in findings) else 0


def _app_of(asked: argparse.Namespace) -> str:
    """Return the app that was named; an option that takes several words may have swallowed it as its last one."""
    if asked.app is not None:
        return str(asked.app)
    for words in (asked.platform, asked.ignore):
        if words and ":" in words[-1]:
            return str(words.pop())
    raise ValueError("name the app as for a server, such as main:app")


def _load(place: str) -> tuple[Any, WebSocketConnectionManager]:
    """Import an app, and find its manager: the one that it shows, or the only one that its module has."""
    name, _, attribute = place.partition(":")
    try:
        module = importlib.import_module(name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # an app may raise anything, and one that exits with 0 would pass
        raise ValueError(f"cannot import {name!r}: {type(error).__name__}: {error}") from error
    app: Any = module
    for part in (attribute or "app").split("."):
        app = getattr(app, part, None)
    if not hasattr(app, "routes"):
        raise ValueError(f"{place} is no app: name it as for a server, such as main:app")
    managers = {value for value in vars(module).values() if isinstance(value, WebSocketConnectionManager)}
    manager = manager_of_app(app) or (managers.pop() if len(managers) == 1 else None)
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
