"""Which web pages may open a socket: the defence against cross-site WebSocket hijacking.

A browser lets any page open a socket to any server and sends the server's cookies with it. What it also sends, and what
no page can alter, is the page's origin.
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from collections.abc import Sequence
from typing import Final, Literal, NamedTuple

OriginProblem = Literal["missing", "null", "malformed", "several", "foreign"]
"""Why an origin may not come in."""

MAX_ORIGIN_CHARS: Final = 512
"""An origin as long as that is malformed: an application's regular expression never sees it."""

MAX_HOST_CHARS: Final = 253

_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
_SCHEME: Final = re.compile(r"[a-z][a-z0-9+.-]*")
_LABELS: Final = re.compile(r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*")  # no two ways to match: linear


class _HostPort(NamedTuple):
    """Host and port, in the one spelling that is compared; no port where it is the scheme's own."""

    host: str
    port: int | None


class _Origin(NamedTuple):
    scheme: str
    host_port: _HostPort

    def __str__(self) -> str:
        port = "" if self.host_port.port is None else f":{self.host_port.port}"
        return f"{self.scheme}://{self.host_port.host}{port}"


class OriginPolicy:
    """Decides by its origin whether a handshake may come in.

    The same origin always may: a page of `http` or `https` whose host and port are ours. Our own scheme does not count,
    since TLS may end at a proxy. What is listed may come in beside it:

    - `"https://app.example.com"`, with `:8443` behind it where the port is not the scheme's own; and other schemes, as
      in `"chrome-extension://abcdefgh"`.
    - `"https://*.example.com"`: every host below `example.com`, at any depth; not `example.com` itself.
    - A `re.Pattern`, or a text that begins with `^`, which has to match the whole origin, as it came or in its normal
      spelling: lower case, no port where it is the scheme's own, no dot at the end of the host, and an international
      name as `xn--`. Some devices send a path behind it: only a pattern sees that. One that takes exponential time on
      511 characters takes it here, too.
    - `"*"`: every client, whatever its Origin header says.
    - `"null"`: pages without an origin. A sandboxed frame of any page is one, so that lets all pages in.

    Same origin trusts the Host header, which a page whose name has been rebound to our address brings along. Against
    that, on a server in a private network, helps Starlette's `TrustedHostMiddleware`.

    Args:
        allowed: What is listed; `None` is the same as an empty list.
        required: Refuse what has no origin. Browsers always send one: what does not is none, and has nobody's cookies.

    Raises:
        ValueError: Something in the list is no origin; the error says what to write.
    """

    def __init__(self, allowed: Sequence[str | re.Pattern[str]] | None, *, required: bool = False) -> None:
        if isinstance(allowed, str):
            raise ValueError(f"allowed origins are a list: write [{allowed!r}]")
        self._required = required
        self._any = self._null = False
        self._exact: set[_Origin] = set()
        self._below: list[tuple[str, str, int | None]] = []  # scheme, suffix with its dot, port
        self._patterns: list[re.Pattern[str]] = []
        for entry in allowed or ():
            self._add(entry)

    def problem(self, origins: Sequence[str], hosts: Sequence[str]) -> OriginProblem | None:
        """Return `None` if a handshake may come in, otherwise what is wrong with its origin.

        Args:
            origins: The values of all its Origin headers.
            hosts: The hosts that are ours, one each, with the port where it is told: that of the Host header, and that
                of X-Forwarded-Host if it comes from a proxy that is trusted.
        """
        if not origins:
            return "missing" if self._required else None
        if self._any:  # an origin that is none is no more dangerous than a foreign one
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
        """Whether a pattern matches a whole text."""
        return len(text) < MAX_ORIGIN_CHARS and any(pattern.fullmatch(text) for pattern in self._patterns)

    def _is_listed(self, origin: _Origin) -> bool:
        if origin in self._exact:
            return True
        scheme, (host, port) = origin
        if any(scheme == s and host.endswith(suffix) and port == p for s, suffix, p in self._below):
            return True
        return self._matches(str(origin))

    def _add(self, entry: str | re.Pattern[str]) -> None:
        if isinstance(entry, re.Pattern):
            if not isinstance(entry.pattern, str):
                raise ValueError(f"allowed origin {entry.pattern!r} is a pattern of bytes: make it one of text")
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
                self._below.append((origin.scheme, f".{origin.host_port.host}", origin.host_port.port))
            else:
                self._exact.add(origin)


def _is_same(origin: _Origin, hosts: Sequence[str]) -> bool:
    """Whether an origin is that of one of the hosts. A host without a port has the one of the origin's scheme."""
    return origin.scheme in _DEFAULT_PORTS and any(
        _host_port_of(host, origin.scheme) == origin.host_port for host in hosts
    )


# ── reading what a browser sends ──


def _origin_of(text: str) -> _Origin | None:
    """An origin in its normal spelling; `None` if it is not the serialised origin of RFC 6454, section 6.2."""
    if len(text) >= MAX_ORIGIN_CHARS or not text.isascii():  # the lower case of some others is ASCII
        return None
    scheme, separator, authority = text.lower().partition("://")
    if not separator or not _SCHEME.fullmatch(scheme):
        return None
    if not authority and scheme not in _DEFAULT_PORTS:  # `file://`, as some web views send it
        return _Origin(scheme, _HostPort("", None))
    host_port = _host_port_of(authority, scheme)
    return None if host_port is None else _Origin(scheme, host_port)


def _host_port_of(authority: str, scheme: str) -> _HostPort | None:
    """The host and port of an authority, as a Host header or an origin has it; `None` if it is none."""
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
    """A port; 0 where there is none or it is the scheme's own, -1 where it is none that can be."""
    if not digits:
        return 0
    if len(digits) > 5 or not digits.isdecimal() or not 0 < int(digits) < 65536:
        return -1
    return 0 if _DEFAULT_PORTS.get(scheme) == int(digits) else int(digits)


# ── reading what an application lists ──


def _pattern_of(entry: str) -> re.Pattern[str]:
    try:
        return re.compile(entry)
    except re.error as error:
        raise ValueError(f"allowed origin {entry!r} is a broken regular expression: {error}") from None


def _parse_entry(entry: str) -> tuple[bool, _Origin]:
    """An origin of the list, and whether it stands for all hosts below.

    Raises:
        ValueError: It is none.
    """
    scheme, separator, rest = entry.partition("://")
    if "@" in entry:  # what is before it may be a password, so it is not shown
        raise ValueError(
            "an allowed origin has a user before its host, with an @: write 'https://app.example.com' alone"
        )
    if "," in entry or any(char.isspace() for char in entry):
        raise ValueError(f"allowed origin {entry!r} has a space or a comma in it: write a list with one origin each")
    if not separator:
        raise ValueError(f"allowed origin {entry!r} has no scheme: write 'https://{entry}'")
    host = re.split(r"[/?#\\]", rest, maxsplit=1)[0]
    wild = host.startswith("*.")
    name = host[2:] if wild else host
    if "*" in name or "*" in scheme:
        raise ValueError(
            f"allowed origin {entry!r} has a * where none can be: write 'https://*.example.com' for all hosts below, "
            "'*' for every origin, or a regular expression that begins with ^"
        )
    if host != rest:
        raise ValueError(f"allowed origin {entry!r} has something behind its host: write '{scheme}://{host}'")
    if scheme.lower() in ("ws", "wss"):
        page = "https" if scheme.lower() == "wss" else "http"
        raise ValueError(f"allowed origin {entry!r} is a socket's; that of the page is wanted: '{page}://{host}'")
    origin = _origin_of(f"{scheme}://{_ascii(name, entry)}")
    if origin is None or (wild and not origin.host_port.host):
        raise ValueError(f"allowed origin {entry!r} is none: write 'https://app.example.com', with ':8443' for a port")
    if wild and not _is_domain(origin.host_port.host):
        raise ValueError(f"allowed origin {entry!r} is too wide: write at least two labels, as in '*.example.com'")
    return wild, origin


def _is_domain(host: str) -> bool:
    """Whether the hosts below can belong to one owner: not those of a top-level domain, and not parts of an address."""
    return host == "localhost" or ("." in host and host[0] != "[" and not host.rpartition(".")[2].isdecimal())


def _ascii(name: str, entry: str) -> str:
    """A host, with its port, as browsers send it.

    Raises:
        ValueError: Python's IDNA of 2003 writes it in another way than browsers do, or not at all.
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
