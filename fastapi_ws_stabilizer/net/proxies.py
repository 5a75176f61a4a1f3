"""Whose connection it is, behind proxies, and what is counted as one address."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence
from typing import Final

UNIX: Final = "unix"
"""The name of a peer that has no address: it has come over a Unix socket."""

ANY_ADDRESS: Final = "*"

MAX_HOPS: Final = 64
"""Entries of X-Forwarded-For that are looked at, from the right."""

MAX_ADDRESS_CHARS: Final = 64
"""What is longer is no address, with or without a port."""

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_MAPPED: Final = ipaddress.IPv6Network("::ffff:0:0/96")


class TrustedProxies:
    """The proxies whose word is taken for whose connection they pass on.

    Args:
        entries: IP addresses; networks, as in `10.0.0.0/8`; `"unix"` for a peer without an address; or `"*"` for
            everybody, on a server that nobody but its proxy can reach. With `"*"` the first entry of X-Forwarded-For is
            the client, and where the proxy appends to what it gets, as most do, the client has written that entry
            itself: it has as many addresses as it likes, and no limit by address holds.

    Raises:
        ValueError: Something in the list is none of these; the error says what to write.
    """

    def __init__(self, entries: Sequence[str]) -> None:
        if isinstance(entries, str):
            raise ValueError(f"trusted proxies are a list: write [{entries!r}]")
        self._trusts_all = ANY_ADDRESS in entries
        self._unix = UNIX in entries
        networks = [_network(entry) for entry in entries if entry not in (ANY_ADDRESS, UNIX)]
        # Asked at each handshake, about lists of clouds with dozens of networks: a set for each length of prefix.
        self._texts = frozenset(str(one.network_address) for one in networks if one.prefixlen == one.max_prefixlen)
        self._prefixes: dict[tuple[int, int], set[int]] = {}  # version of IP, bits behind the prefix → prefixes
        for one in networks:
            behind = one.max_prefixlen - one.prefixlen
            self._prefixes.setdefault((one.version, behind), set()).add(int(one.network_address) >> behind)

    def trusts(self, peer: str | None) -> bool:
        """Whether a peer is one of them.

        Args:
            peer: Its address as the server tells it; `None` where it has none.
        """
        if self._trusts_all:
            return True
        if not peer:
            return self._unix
        return peer in self._texts or self._has(_address(peer))

    def client_of(self, peer: str | None, forwarded_for: Sequence[str]) -> str:
        """Return the address of the client of a connection.

        X-Forwarded-For counts only if the peer is trusted. It is read from the right, since each proxy appends whom it
        was called by: the first that is not trusted is the client, and what stands left of it anybody may have written.
        If all are trusted it is the leftmost, and where something is no address it is the last before that.

        Args:
            peer: The address of the other end, as the server tells it; `None` where it has none.
            forwarded_for: The values of all X-Forwarded-For headers, in their order.

        Returns:
            An address in its normal spelling, one of IPv4 in IPv6 as that of IPv4, without port and zone; for a peer
            without an address `"unix"`; for a peer whose address is none what the server calls it.
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
    """Return what is counted as one address.

    An address of IPv4 is itself, also when it is mapped into IPv6. An address of IPv6 is its `/64`: that is the least
    that one customer gets, with as many addresses as it likes. Anything else is as it is, and cut where an address ends
    at the latest: some servers hand on what a client has written.
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
    """An address without its zone, one that is mapped into IPv6 as that of IPv4; `None` if it is none."""
    if len(text) > MAX_ADDRESS_CHARS:
        return None
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return address if isinstance(address, ipaddress.IPv4Address) else address.ipv4_mapped or address


def _from_the_right(values: Sequence[str]) -> Iterator[str]:
    """The entries of a list that goes over several headers, the last one first. Empty ones are none, by RFC 9110."""
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
    """An entry of X-Forwarded-For without its port; nothing if what stands there is none."""
    if entry.startswith("["):
        address, bracket, rest = entry[1:].partition("]")
        return address if bracket and ":" in address and _is_port(rest) else ""
    if entry.count(":") == 1:
        address, _, _ = entry.partition(":")
        return address if _is_port(entry[len(address) :]) else ""
    return entry


def _is_port(rest: str) -> bool:
    """Whether what stands behind an address is a colon and a port, or nothing."""
    return not rest or (rest[0] == ":" and len(rest) <= 6 and rest[1:].isascii() and rest[1:].isdecimal())


def _network(entry: str) -> _Network:
    """A network of the list; an address is one of its own.

    Raises:
        ValueError: It is none.
    """
    if "%" in entry:
        raise ValueError(f"trusted proxy {entry!r} has a zone: write '{entry.partition('%')[0]}'")
    try:
        network = ipaddress.ip_network(entry, strict=False)
    except ValueError:
        raise ValueError(
            f"trusted proxy {entry!r} is no address: write an IP address, a network as in '10.0.0.0/8', 'unix' for a "
            "Unix socket, or '*' for everybody; names are not resolved"
        ) from None
    if network.network_address != ipaddress.ip_address(entry.partition("/")[0]):
        raise ValueError(f"trusted proxy {entry!r} is an address within a network: write '{network}' for all of it")
    if isinstance(network, ipaddress.IPv6Network) and network.subnet_of(_MAPPED):
        mapped = int(network.network_address) & 0xFFFFFFFF
        return ipaddress.IPv4Network((mapped, network.prefixlen - _MAPPED.prefixlen))
    return network
