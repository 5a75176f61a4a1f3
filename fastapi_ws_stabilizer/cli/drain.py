"""`drain URL`: ask a running server to drain, and print its report.

It needs no extra and no HTTP library, so that a `preStop` hook can run it in any image.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from typing import Any, Final

from fastapi_ws_stabilizer.cli.output import exit_with_error

MARGIN: Final = 5.0
"""Seconds that the command waits for a response after the drain's own timeout."""

LONGEST: Final = 3600.0
"""Longest drain, in seconds, that the stats router accepts."""

MAX_ANSWER: Final = 65536
"""Bytes that are read from a response. A drain report has about 200."""

EXCERPT: Final = 300
"""Characters that are printed of a response that is not a drain report."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.set_defaults(run=_run)
    parser.add_argument("url", help="URL of the server's stats router, such as http://127.0.0.1:8000/ws-stats")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds that the drain may take (default: 30)")
    parser.add_argument(
        "--secret-env",
        default="WS_DRAIN_SECRET",
        metavar="NAME",
        help="environment variable that holds drain_secret (default: WS_DRAIN_SECRET)",
    )


def _run(args: argparse.Namespace) -> int:
    secret = os.environ.get(args.secret_env, "").strip()  # a secret that was read from a file ends with a newline
    if not secret:
        return exit_with_error(f"no secret: set {args.secret_env} to the server's drain_secret", code=2)
    if not secret.isprintable() or max(secret) > "\xff":
        return exit_with_error(f"{args.secret_env} contains a character that an HTTP header cannot carry", code=2)
    if not 0 < args.timeout <= LONGEST:
        return exit_with_error(f"--timeout must be above 0 s and at most {LONGEST:g} s, not {args.timeout:g}", code=2)
    if not _is_valid_url(args.url):
        return exit_with_error(f"not an http(s) URL of a stats router: {args.url}", code=2)
    return _drain(args.url, args.timeout, secret)


def _is_valid_url(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        is_whole = bool(parts.hostname) and parts.port != 0  # an invalid port raises here
    except ValueError:
        return False
    # A query, a fragment or a user name would change the address once `/drain` is appended.
    plain = url.isascii() and url.isprintable() and not any(character in url for character in " ?#@")
    return is_whole and plain and parts.scheme in ("http", "https")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Redirect handler that follows no redirect, so that only the named server receives the secret."""

    def redirect_request(self, *_: Any) -> None:
        """Return no request, so that urllib raises the redirect as an error."""


def _drain(url: str, timeout: float, secret: str) -> int:
    request = urllib.request.Request(  # noqa: S310 (`_is_valid_url` allows http and https only)
        f"{url.rstrip('/')}/drain?timeout={timeout}", method="POST", headers={"Authorization": f"Bearer {secret}"}
    )
    # The empty ProxyHandler ignores the proxies of the environment: a proxy must not receive the secret.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)
    try:
        with opener.open(request, timeout=timeout + MARGIN) as response:
            answer = response.read(MAX_ANSWER)
    except urllib.error.HTTPError as error:
        return exit_with_error(_describe_http_error(error, secret), secret)
    except (http.client.InvalidURL, UnicodeError):
        return exit_with_error(f"not an http(s) URL of a stats router: {url}", secret, code=2)
    except (OSError, ValueError, http.client.HTTPException) as error:
        return exit_with_error(f"no answer: {str(error) or type(error).__name__}", secret)
    try:
        report = json.loads(answer)
    except (ValueError, RecursionError):
        report = None
    if not isinstance(report, dict) or type(report.get("failed_count")) is not int:
        return exit_with_error(f"not a drain report: {_truncate(answer, secret)}")
    print(json.dumps(report))
    return 1 if report["failed_count"] else 0


def _describe_http_error(error: urllib.error.HTTPError, secret: str) -> str:
    with error:
        if 300 <= error.code < 400:
            return f"redirected: HTTP {error.code} to {error.headers.get('Location')}, not followed"
        try:
            body = _truncate(error.read(MAX_ANSWER), secret)
        except (OSError, http.client.HTTPException):
            body = "(the body cannot be read)"
    return f"refused: HTTP {error.code} {body}"


def _truncate(body: bytes, secret: str) -> str:
    """Return the first characters of a body without the secret.

    The secret is removed before the cut, because the cut could leave a part of it.
    """
    return body.decode(errors="replace").replace(secret, "***")[:EXCERPT]
