"""Origin policy: the defence against cross-site WebSocket hijacking.

A browser lets any page open a socket to any server, and sends the server's cookies with it. It also sends the page's
origin, which no page can change.
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from collections.abc import Sequence
from typing import Final, Literal, NamedTuple

OriginProblem = Literal["missing", "null", "malformed", "several", "foreign"]
"""Reason for the rejection of an origin."""

MAX_ORIGIN_CHARS: Final = 512
"""Length in characters from which an origin is rejected before an application regex sees it."""

MAX_HOST_CHARS: Final = 253

_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
_SCHEME: Final = re.compile(r"[a-z][a-z0-9+.-]*")
_LABELS: Final = re.compile(r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*")  # only one match is possible, so matching is linear


class _HostPort(NamedTuple):
    """Host and port in normal form. The port is `None` if it is the default port of the scheme."""

    host: str
    port: int | None


class _Origin(NamedTuple):
    scheme: str
    host_port: _HostPort

    def __str__(self) -> str:
        port = "" if self.host_port.port is None else f":{self.host_port.port}"
        return f"{self.scheme}://{self.host_port.host}{port}"


class OriginPolicy:
    """Policy that accepts or rejects a handshake by its origin.

    The same origin is always accepted: a page of `http` or `https` with the host and port of this server. The server's
    own scheme does not count, because TLS may end at a proxy. The list accepts further origins:

    - `"https://app.example.com"`, followed by `:8443` if the port is not the default port of the scheme. Other schemes
      are possible, as in `"chrome-extension://abcdefgh"`.
    - `"https://*.example.com"`: every host below `example.com`, at any depth, but not `example.com` itself.
    - A `re.Pattern`, or a string that begins with `^`. It must match the whole origin, as received or in normal form:
      lower case, no default port, no dot at the end of the host, and an international name as `xn--`. Some devices
      append a path, which only a pattern matches. Avoid catastrophic backtracking: the input can have 511 characters.
    - `"*"`: every client, whatever its Origin header is.
    - `"null"`: pages without an origin. Any page can create a sandboxed frame without one, so this accepts all pages.

    The same-origin rule trusts the Host header. In a DNS rebinding attack, the attacker's name resolves to this server,
    and the browser sends that name as Host. Starlette's `TrustedHostMiddleware` protects a server in a private network
    against that.

    Args:
        allowed: The list; `None` is the same as an empty list.
        required: Whether to reject handshakes without an origin. Browsers always send one. A client without one is not
            a browser, so it sends no cookies of a user's browser.

    Raises:
        ValueError: An entry of the list is not an origin. The message says what to write.
    """

    def __init__(self, allowed: Sequence[str | re.Pattern[str]] | None, *, required: bool = False) -> None:
        if isinstance(allowed, str):
            raise ValueError(f"allowed origins are a list: write [{allowed!r}]")
        self._required = required
        self._any = self._null = False
        self._exact: set[_Origin] = set()
        self._wildcards: list[tuple[str, str, int | None]] = []  # scheme, suffix with its leading dot, port
        self._patterns: list[re.Pattern[str]] = []
        for entry in allowed or ():
            self._add(entry)

    def problem(self, origins: Sequence[str], hosts: Sequence[str]) -> OriginProblem | None:
        """Return the problem of a handshake's origin; `None` if it is accepted.

        Args:
            origins: Values of all its Origin headers.
            hosts: Hosts of this server, with a port if it is known: from the Host header, and from X-Forwarded-Host of
                a trusted proxy.
        """
        if not origins:
            return "missing" if self._required else None
        if self._any:  # an invalid origin is no more dangerous than a foreign one
            return None
        if len(origins) > 1:
            return "several"
        text = origins[0]
        if text == "null":
            return None if self._null or self._matches(text) else "null"
        origin = _origin_of(text)
        if origin is not None and (_is_same(origin, hosts) or self._is_listed(origin)):
            return None
        if self._matches(text):
            return None
        return "malformed" if origin is None else "foreign"

    def _matches(self, text: str) -> bool:
        """Whether a pattern matches a whole string."""
        return len(text) < MAX_ORIGIN_CHARS and any(pattern.fullmatch(text) for pattern in self._patterns)

    def _is_listed(self, origin: _Origin) -> bool:
        if origin in self._exact:
            return True
        scheme, (host, port) = origin
        if any(scheme == s and host.endswith(suffix) and port == p for s, suffix, p in self._wildcards):
            return True
        return self._matches(str(origin))

    def _add(self, entry: str | re.Pattern[str]) -> None:
        if isinstance(entry, re.Pattern):
            if not isinstance(entry.pattern, str):
                raise ValueError(f"allowed origin {entry.pattern!r} is a bytes pattern: use a str pattern")
            self._patterns.append(entry)
        elif entry == "*":
            self._any = True
        elif entry == "null":
            self._null = True
        elif entry.startswith("^"):
            self._patterns.append(_pattern_of(entry))
        else:
            wild, origin = _parse_entry(entry)
            if wild:
                self._wildcards.append((origin.scheme, f".{origin.host_port.host}", origin.host_port.port))
            else:
                self._exact.add(origin)


def _is_same(origin: _Origin, hosts: Sequence[str]) -> bool:
    """Whether an origin is one of the hosts. A host without a port has the default port of the origin's scheme."""
    return origin.scheme in _DEFAULT_PORTS and any(
        _host_port_of(host, origin.scheme) == origin.host_port for host in hosts
    )


# ── parsing Origin and Host headers ──


def _origin_of(text: str) -> _Origin | None:
    """Return an origin in normal form; `None` if it is not a serialised origin of RFC 6454, section 6.2."""
    if len(text) >= MAX_ORIGIN_CHARS or not text.isascii():  # the lower case of some non-ASCII characters is ASCII
        return None
    scheme, separator, authority = text.lower().partition("://")
    if not separator or not _SCHEME.fullmatch(scheme):
        return None
    if not authority and scheme not in _DEFAULT_PORTS:  # `file://`, which some web views send
        return _Origin(scheme, _HostPort("", None))
    host_port = _host_port_of(authority, scheme)
    return None if host_port is None else _Origin(scheme, host_port)


def _host_port_of(authority: str, scheme: str) -> _HostPort | None:
    """Return the host and port of a Host header or an origin; `None` if they are invalid."""
    if len(authority) >= MAX_ORIGIN_CHARS or not authority.isascii():
        return None
    authority = authority.lower()
    if authority.startswith("["):
        literal, bracket, rest = authority[1:].partition("]")
        host = _ipv6(literal) if bracket and rest[:1] in ("", ":") else None
        digits = rest[1:]
    else:
        name, _, digits = authority.partition(":")
        host = _name(name)
    port = _port(digits, scheme)
    return None if host is None or port < 0 else _HostPort(host, port or None)


def _ipv6(literal: str) -> str | None:
    try:
        return None if "%" in literal else f"[{ipaddress.IPv6Address(literal).compressed}]"
    except ValueError:
        return None


def _name(name: str) -> str | None:
    name = name[:-1] if name.endswith(".") else name
    return name if len(name) <= MAX_HOST_CHARS and _LABELS.fullmatch(name) else None


def _port(digits: str, scheme: str) -> int:
    """Return a port; 0 if it is absent or the default port of the scheme, -1 if it is invalid."""
    if not digits:
        return 0
    if len(digits) > 5 or not digits.isdecimal() or not 0 < int(digits) < 65536:
        return -1
    return 0 if _DEFAULT_PORTS.get(scheme) == int(digits) else int(digits)


# ── parsing the list of allowed origins ──


def _pattern_of(entry: str) -> re.Pattern[str]:
    try:
        return re.compile(entry)
    except re.error as error:
        raise ValueError(f"allowed origin {entry!r} is a broken regular expression: {error}") from None


def _parse_entry(entry: str) -> tuple[bool, _Origin]:
    """Return an origin of the list, and whether it stands for all hosts below.

    Raises:
        ValueError: It is not an origin.
    """
    scheme, separator, rest = entry.partition("://")
    if "@" in entry:  # the part before it may be a password, so it is not shown
        raise ValueError(
            "an allowed origin has user information before its host (@): write 'https://app.example.com' alone"
        )
    if "," in entry or any(char.isspace() for char in entry):
        raise ValueError(f"allowed origin {entry!r} has a space or a comma: write a list with one origin each")
    if not separator:
        raise ValueError(f"allowed origin {entry!r} has no scheme: write 'https://{entry}'")
    host = re.split(r"[/?#\\]", rest, maxsplit=1)[0]
    wild = host.startswith("*.")
    name = host[2:] if wild else host
    if "*" in name or "*" in scheme:
        raise ValueError(
            f"allowed origin {entry!r} has a misplaced *: write 'https://*.example.com' for all hosts below, "
            "'*' for every origin, or a regular expression that begins with ^"
        )
    if host != rest:
        raise ValueError(f"allowed origin {entry!r} has text after its host: write '{scheme}://{host}'")
    if scheme.lower() in ("ws", "wss"):
        page = "https" if scheme.lower() == "wss" else "http"
        raise ValueError(
            f"allowed origin {entry!r} is the origin of a socket: write the origin of the page, '{page}://{host}'"
        )
    origin = _origin_of(f"{scheme}://{_ascii(name, entry)}")
    if origin is None or (wild and not origin.host_port.host):
        raise ValueError(
            f"allowed origin {entry!r} is not an origin: write 'https://app.example.com', with ':8443' for a port"
        )
    if wild and not _is_domain(origin.host_port.host):
        raise ValueError(f"allowed origin {entry!r} is too broad: write at least two labels, as in '*.example.com'")
    return wild, origin


def _is_domain(host: str) -> bool:
    """Whether a single owner can control all hosts below it.

    A top-level domain and an IP address are not accepted.
    """
    return host == "localhost" or ("." in host and host[0] != "[" and not host.rpartition(".")[2].isdecimal())


def _ascii(name: str, entry: str) -> str:
    """Return a host, with its port, as browsers send it.

    Raises:
        ValueError: Python's IDNA 2003 encodes it differently than browsers do, or cannot encode it.
    """
    if name.isascii():
        return name
    host, colon, port = name.partition(":")
    host = unicodedata.normalize("NFC", host.lower())
    try:
        encoded = host.encode("idna")
        if encoded.decode("idna") != host:
            raise UnicodeError
    except UnicodeError:
        raise ValueError(f"allowed origin {entry!r}: write its host as browsers send it, 'xn--...'") from None
    return encoded.decode("ascii") + colon + port
