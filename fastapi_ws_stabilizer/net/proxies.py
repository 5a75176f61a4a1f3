"""Trusted proxies: the client address of a connection, and the key for limits by address."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence
from typing import Final

UNIX: Final = "unix"
"""Name of a peer without an address, which connected over a Unix socket."""

ANY_ADDRESS: Final = "*"

MAX_HOPS: Final = 64
"""Entries of X-Forwarded-For that are read, from the right."""

MAX_ADDRESS_CHARS: Final = 64
"""Maximum length of an address in characters, with or without a port."""

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_MAPPED: Final = ipaddress.IPv6Network("::ffff:0:0/96")


class TrustedProxies:
    """Proxies that are trusted to report the address of a client.

    Args:
        entries: IP addresses; networks, as in `10.0.0.0/8`; `"unix"` for a peer without an address; or `"*"` for every
            peer, on a server that only its proxy can reach. With `"*"` the first entry of X-Forwarded-For is the
            client. Most proxies append to the header that they receive. The client can then forge that entry and evade
            every limit by address.

    Raises:
        ValueError: An entry is none of these. The message says what to write.
    """

    def __init__(self, entries: Sequence[str]) -> None:
        if isinstance(entries, str):
            raise ValueError(f"trusted proxies are a list: write [{entries!r}]")
        self._trusts_all = ANY_ADDRESS in entries
        self._unix = UNIX in entries
        networks = [_network(entry) for entry in entries if entry not in (ANY_ADDRESS, UNIX)]
        # One set per prefix length, because each handshake is checked, and lists of clouds have dozens of networks.
        self._texts = frozenset(str(one.network_address) for one in networks if one.prefixlen == one.max_prefixlen)
        self._prefixes: dict[tuple[int, int], set[int]] = {}  # IP version, bits behind the prefix → prefixes
        for one in networks:
            behind = one.max_prefixlen - one.prefixlen
            self._prefixes.setdefault((one.version, behind), set()).add(int(one.network_address) >> behind)

    def trusts(self, peer: str | None) -> bool:
        """Whether a peer is a trusted proxy.

        Args:
            peer: Its address as the server reports it; `None` if it has none.
        """
        if self._trusts_all:
            return True
        if not peer:
            return self._unix
        return peer in self._texts or self._has(_address(peer))

    def client_address(self, peer: str | None, forwarded_for: Sequence[str]) -> str:
        """Return the address of the client of a connection.

        X-Forwarded-For counts only if the peer is trusted. It is read from the right, because each proxy appends the
        address of its peer. The first address that is not trusted is the client, and the client may have written
        everything left of it. If all addresses are trusted, the leftmost one is the client. An entry that is not an
        address ends the search, and the last address before it is the client.

        Args:
            peer: Address of the peer as the server reports it; `None` if it has none.
            forwarded_for: Values of all X-Forwarded-For headers, in order.

        Returns:
            An address in normal form, without port and zone, and as IPv4 if it is mapped into IPv6. It is `"unix"` for
                a peer without an address, and the server's name for a peer if that is not an address.
        """
        client = _normal(peer) if peer else UNIX
        if not forwarded_for or not self.trusts(peer):
            return client
        for hop in _from_the_right(forwarded_for):
            address = _address(_without_port(hop))
            if address is None:
                break
            client = str(address)
            if not self._trusts_all and not self._has(address):
                break
        return client

    def _has(self, address: _Address | None) -> bool:
        if address is None:
            return False
        version, number = address.version, int(address)
        return any(v == version and number >> behind in ones for (v, behind), ones in self._prefixes.items())


def rate_limit_key(address: str) -> str:
    """Return the key for limits by address.

    It is the address for IPv4, also if it is mapped into IPv6. For IPv6 it is the `/64` network, because one customer
    gets at least that, with 2**64 addresses. Any other string is its own key, truncated to the length of an address,
    because some servers report what a client has written.
    """
    parsed = _address(address)
    if parsed is None:
        return address[:MAX_ADDRESS_CHARS]
    if parsed.version == 4:
        return str(parsed)
    return f"{ipaddress.IPv6Address(int(parsed) >> 64 << 64)}/64"


def _normal(peer: str) -> str:
    address = _address(peer)
    return peer if address is None else str(address)


def _address(text: str) -> _Address | None:
    """Return an address without its zone, and as IPv4 if it is mapped into IPv6; `None` if it is invalid."""
    if len(text) > MAX_ADDRESS_CHARS:
        return None
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return address if isinstance(address, ipaddress.IPv4Address) else address.ipv4_mapped or address


def _from_the_right(values: Sequence[str]) -> Iterator[str]:
    """Yield the entries of several headers, the last one first. RFC 9110 says to ignore empty ones."""
    left = MAX_HOPS
    for value in reversed(values):
        entries = value.rsplit(",", left)
        for entry in reversed(entries[-left:]):
            left -= 1
            if entry := entry.strip(" \t"):
                yield entry
        if not left:
            return


def _without_port(entry: str) -> str:
    """Return an entry of X-Forwarded-For without its port; an empty string if the entry is invalid."""
    if entry.startswith("["):
        address, bracket, rest = entry[1:].partition("]")
        return address if bracket and ":" in address and _is_port(rest) else ""
    if entry.count(":") == 1:
        address, _, _ = entry.partition(":")
        return address if _is_port(entry[len(address) :]) else ""
    return entry


def _is_port(rest: str) -> bool:
    """Whether the text behind an address is a colon and a port, or empty."""
    return not rest or (rest[0] == ":" and len(rest) <= 6 and rest[1:].isascii() and rest[1:].isdecimal())


def _network(entry: str) -> _Network:
    """Return a network of the list. A single address is a network of one.

    Raises:
        ValueError: It is not a network.
    """
    if "%" in entry:
        raise ValueError(f"trusted proxy {entry!r} has a zone: write '{entry.partition('%')[0]}'")
    try:
        network = ipaddress.ip_network(entry, strict=False)
    except ValueError:
        raise ValueError(
            f"trusted proxy {entry!r} is not an address: write an IP address, a network as in '10.0.0.0/8', 'unix' "
            "for a Unix socket, or '*' for every peer; names are not resolved"
        ) from None
    if network.network_address != ipaddress.ip_address(entry.partition("/")[0]):
        raise ValueError(f"trusted proxy {entry!r} is an address within a network: write '{network}' for all of it")
    if isinstance(network, ipaddress.IPv6Network) and network.subnet_of(_MAPPED):
        mapped = int(network.network_address) & 0xFFFFFFFF
        return ipaddress.IPv4Network((mapped, network.prefixlen - _MAPPED.prefixlen))
    return network
