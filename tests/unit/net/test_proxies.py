"""Tests of the client address behind proxies."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastapi_ws_stabilizer.net.proxies import MAX_ADDRESS_CHARS, MAX_HOPS, TrustedProxies, rate_limit_key

ADDRESSES = st.ip_addresses().filter(lambda address: address.version == 4 or address.ipv4_mapped is None)
"""Addresses of their own, without IPv4 addresses mapped into IPv6."""

# ── trusted peers ──


@pytest.mark.parametrize(
    ("entry", "peer"),
    [
        ("10.0.0.7", "10.0.0.7"),
        ("10.0.0.7", "::ffff:10.0.0.7"),
        ("::ffff:10.0.0.7", "10.0.0.7"),
        ("10.0.0.0/8", "10.255.255.255"),
        ("10.0.0.0/8", "::ffff:10.1.2.3"),
        ("10.0.0.0/255.0.0.0", "10.1.2.3"),
        ("::ffff:10.0.0.0/104", "10.1.2.3"),
        ("0.0.0.0/0", "203.0.113.9"),
        ("::1", "0:0:0:0:0:0:0:1"),
        ("2001:DB8::7", "2001:db8::7"),
        ("2001:db8::/32", "2001:db8:ffff::1"),
        ("::/0", "2001:db8::1"),
        ("fe80::1", "fe80::1%eth0"),
        ("unix", None),
        ("unix", ""),
        ("*", None),
        ("*", "203.0.113.9"),
        ("*", "testclient"),
    ],
)
def test_listed_address_is_trusted(entry: str, peer: str | None) -> None:
    """A listed address, network or Unix socket is trusted in any spelling of the address, and `*` trusts each peer."""
    assert TrustedProxies(["192.0.2.1", entry]).trusts(peer)


@pytest.mark.parametrize(
    ("entry", "peer"),
    [
        ("10.0.0.7", "10.0.0.8"),
        ("10.0.0.7", "::a00:7"),
        ("10.0.0.7", None),
        ("10.0.0.7", ""),
        ("10.0.0.7", "10.0.0.7.evil"),
        ("10.0.0.7", "10.0.0.07"),
        ("10.0.0.0/8", "11.0.0.0"),
        ("10.0.0.0/8", "a00::"),
        ("::/0", "10.0.0.7"),
        ("0.0.0.0/0", "::1"),
        ("0.0.0.0/0", "testclient"),
        pytest.param("0.0.0.0/0", "1" * 1_000_000, id="megabyte"),
        pytest.param("::/0", "fe80::1%" + "x" * MAX_ADDRESS_CHARS, id="long zone"),
        ("2001:db8::/32", "2001:db9::"),
        ("unix", "unix"),
        ("unix", "127.0.0.1"),
    ],
)
def test_unlisted_address_is_not_trusted(entry: str, peer: str | None) -> None:
    """A peer that is not listed is not trusted, even if its name resembles a listed one."""
    assert not TrustedProxies([entry]).trusts(peer)


@given(
    st.lists(ADDRESSES, max_size=5),
    st.lists(st.integers(0, 128), min_size=5, max_size=5),
    ADDRESSES,
)
def test_trusted_networks_agree_with_ipaddress_module(
    bases: list[ipaddress.IPv4Address | ipaddress.IPv6Address],
    lengths: list[int],
    other_address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    """A list of networks contains the same addresses as its networks do for `ipaddress`."""
    networks = [
        ipaddress.ip_network((base, min(length, base.max_prefixlen)), strict=False)
        for base, length in zip(bases, lengths, strict=False)
    ]
    trusted = TrustedProxies([str(network) for network in networks])
    assert all(trusted.trusts(str(base)) for base in bases)
    assert trusted.trusts(str(other_address)) == any(other_address in network for network in networks)
    for network in networks:
        behind = type(network[-1])((int(network[-1]) + 1) % 2**network.max_prefixlen)
        assert trusted.trusts(str(behind)) == any(behind in other for other in networks)


@pytest.mark.parametrize(
    ("entry", "advice"),
    [
        ("nginx", "names are not resolved"),
        ("", "is not an address"),
        (" 10.0.0.7", "is not an address"),
        ("10.0.0", "is not an address"),
        ("10.0.0.0/33", "is not an address"),
        ("10.0.0.7:80", "is not an address"),
        ("[::1]", "is not an address"),
        ("10.0.0.7,10.0.0.8", "is not an address"),
        ("Unix", "'unix' for a Unix socket"),
        ("10.0.0.7/8", "write '10.0.0.0/8' for all of it"),
        ("2001:db8::1/32", "write '2001:db8::/32' for all of it"),
        ("fe80::1%eth0", "has a zone: write 'fe80::1'"),
    ],
)
def test_invalid_trusted_proxy_entry_raises(entry: str, advice: str) -> None:
    """An invalid entry raises at once, with the entry to write instead."""
    with pytest.raises(ValueError, match=re.escape(advice)) as caught:
        TrustedProxies(["10.0.0.7", entry])
    assert repr(entry) in str(caught.value)


def test_trusted_proxies_as_string_raise() -> None:
    """A single string instead of a list raises."""
    with pytest.raises(ValueError, match=re.escape("write ['*']")):
        TrustedProxies("*")


# ── client address ──


@pytest.mark.parametrize("trusted", [[], ["10.0.0.0/8"], ["unix"]], ids=str)
def test_forwarded_for_of_untrusted_peer_is_ignored(trusted: list[str]) -> None:
    """X-Forwarded-For of an untrusted peer is ignored."""
    assert TrustedProxies(trusted).client_address("203.0.113.9", ["192.0.2.1"]) == "203.0.113.9"


@pytest.mark.parametrize(
    ("peer", "client"),
    [
        (None, "unix"),
        ("", "unix"),
        ("203.0.113.9", "203.0.113.9"),
        ("::ffff:203.0.113.9", "203.0.113.9"),
        ("2001:DB8:0::1", "2001:db8::1"),
        ("fe80::1%eth0", "fe80::1"),
        ("testclient", "testclient"),
    ],
)
def test_peer_is_client_without_proxies(peer: str | None, client: str) -> None:
    """A peer that forwards nothing is the client, with its address normalized."""
    assert TrustedProxies([]).client_address(peer, ["192.0.2.1"]) == client
    assert TrustedProxies(["*"]).client_address(peer, []) == client


@pytest.mark.parametrize(
    ("forwarded_for", "client"),
    [
        (["203.0.113.9"], "203.0.113.9"),
        (["spoofed, 192.0.2.1, 203.0.113.9"], "203.0.113.9"),
        (["192.0.2.1, 203.0.113.9, 10.0.0.8"], "203.0.113.9"),
        (["192.0.2.1, 203.0.113.9,10.0.0.8\t,  10.9.9.9 "], "203.0.113.9"),
        (["192.0.2.1", "203.0.113.9", "10.0.0.8"], "203.0.113.9"),
        (["203.0.113.9, 10.0.0.8", "10.0.0.9, 10.0.0.10"], "203.0.113.9"),
        (["10.0.0.9, 10.0.0.8"], "10.0.0.9"),
        (["::ffff:10.0.0.9, ::ffff:10.0.0.8"], "10.0.0.9"),
        (["203.0.113.9,, 10.0.0.8,"], "203.0.113.9"),
        (["203.0.113.9", "", "10.0.0.8"], "203.0.113.9"),
        ([""], "10.0.0.7"),
        ([" , ,"], "10.0.0.7"),
        (["::ffff:203.0.113.9"], "203.0.113.9"),
        (["2001:DB8::0:9"], "2001:db8::9"),
        (["fe80::9%eth0"], "fe80::9"),
    ],
)
def test_rightmost_untrusted_address_is_client(forwarded_for: list[str], client: str) -> None:
    """The rightmost untrusted address over all headers is the client; if all are trusted, the leftmost is."""
    assert TrustedProxies(["10.0.0.0/8"]).client_address("10.0.0.7", forwarded_for) == client


@pytest.mark.parametrize(
    ("entry", "client"),
    [
        ("203.0.113.9:567", "203.0.113.9"),
        ("203.0.113.9:65535", "203.0.113.9"),
        ("[2001:db8::9]:80", "2001:db8::9"),
        ("[2001:db8::9]", "2001:db8::9"),
        ("2001:db8::9", "2001:db8::9"),
    ],
)
def test_port_and_brackets_are_removed_from_address(entry: str, client: str) -> None:
    """Ports and brackets are removed from an address."""
    assert TrustedProxies(["unix"]).client_address(None, [f"192.0.2.1, {entry}"]) == client


@pytest.mark.parametrize(
    "garbage",
    [
        "unknown",
        "_hidden",
        "203.0.113",
        "203.0.113.009",
        "203.0.113.9:",
        "203.0.113.9:x",
        "203.0.113.9:655350",
        "203.0.113.9:\u0668\u0660",
        "203.0.113.9 192.0.2.1",
        "[2001:db8::9",
        "[2001:db8::9]80",
        "[2001:db8::9]:x",
        "[203.0.113.9]",
        "[]",
        ":80",
        "'; drop",
        "203.0.113.9\x00",
        '"203.0.113.9"',
        pytest.param("1" * 1_000_000, id="megabyte of digits"),
        pytest.param(":" * 1_000_000, id="megabyte of colons"),
    ],
)
def test_invalid_forwarded_entry_ends_search(garbage: str) -> None:
    """An invalid entry ends the search: the last proxy before it is the client, and entries left of it do not count."""
    proxies = TrustedProxies(["10.0.0.0/8"])
    assert proxies.client_address("10.0.0.7", [f"192.0.2.1, {garbage}, 10.0.0.8"]) == "10.0.0.8"
    assert proxies.client_address("10.0.0.7", ["192.0.2.1", garbage]) == "10.0.0.7"
    assert TrustedProxies(["unix"]).client_address(None, ["192.0.2.1", garbage]) == "unix"


def test_asterisk_makes_leftmost_address_client() -> None:
    """With `"*"` the leftmost address is the client."""
    assert TrustedProxies(["*"]).client_address("203.0.113.9", ["192.0.2.1, 10.0.0.8", "10.0.0.9"]) == "192.0.2.1"


@pytest.mark.parametrize("split", [lambda hops: [", ".join(hops)], list], ids=["one header", "many headers"])
def test_forwarded_entries_are_searched_up_to_max_hops(split: object) -> None:
    """At most MAX_HOPS entries are read from the right, empty ones included."""
    proxies = TrustedProxies(["10.0.0.0/8"])
    hops = [f"10.0.1.{number}" for number in range(MAX_HOPS)]
    assert proxies.client_address("10.0.0.7", split(["203.0.113.9", *hops[1:]])) == "203.0.113.9"  # type: ignore[operator]
    assert proxies.client_address("10.0.0.7", split(["203.0.113.9", *hops])) == "10.0.1.0"  # type: ignore[operator]
    empty = ["203.0.113.9", *[""] * MAX_HOPS]
    assert proxies.client_address("10.0.0.7", split(empty)) == "10.0.0.7"  # type: ignore[operator]
    assert proxies.client_address("10.0.0.7", split(["203.0.113.9"] * 500_000)) == "203.0.113.9"  # type: ignore[operator]


@given(st.text(max_size=50), st.lists(st.text("10.:,[] afx%", max_size=30), max_size=3))
def test_any_forwarded_header_yields_address_or_peer(peer: str, forwarded_for: Sequence[str]) -> None:
    """Any header gives an address or the peer, and raises nothing."""
    client = TrustedProxies(["*"]).client_address(peer, forwarded_for)
    assert client in (peer, "unix") or str(ipaddress.ip_address(client)) == client


# ── rate limit keys ──


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("203.0.113.9", "203.0.113.9"),
        ("::ffff:203.0.113.9", "203.0.113.9"),
        ("::ffff:cb00:7109", "203.0.113.9"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:DB8:1:2::", "2001:db8:1:2::/64"),
        ("::1", "::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("unix", "unix"),
        ("testclient", "testclient"),
        ("", ""),
        ("203.0.113.9:80", "203.0.113.9:80"),
        pytest.param("x" * 1_000_000, "x" * MAX_ADDRESS_CHARS, id="megabyte"),
    ],
)
def test_rate_limit_key_is_ipv4_address_or_ipv6_network(address: str, network: str) -> None:
    """The key is an IPv4 address, the /64 network of an IPv6 address, or any other text up to a length."""
    assert rate_limit_key(address) == network


@given(st.ip_addresses(v=6), st.integers(0, 2**64 - 1))
def test_addresses_of_one_ipv6_network_share_key(address: ipaddress.IPv6Address, other: int) -> None:
    """All addresses of an IPv6 /64 share one key, which is a network that contains them."""
    neighbour = ipaddress.IPv6Address(int(address) >> 64 << 64 | other)
    if address.ipv4_mapped is None and neighbour.ipv4_mapped is None:
        assert rate_limit_key(str(address)) == rate_limit_key(str(neighbour))
        assert neighbour in ipaddress.IPv6Network(rate_limit_key(str(address)))
