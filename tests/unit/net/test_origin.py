"""Tests of the origins that may open a socket."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastapi_ws_stabilizer.net.origin import MAX_ORIGIN_CHARS, OriginPolicy

OWN_HOSTS = ["app.example.com"]
"""Hosts of the server."""


def problem(origin: str, *allowed: str | re.Pattern[str], hosts: Sequence[str] = ()) -> str | None:
    """Return the problem of an origin."""
    return OriginPolicy(allowed).problem([origin], hosts)


# ── same origin ──


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("https://app.example.com", "app.example.com"),
        ("http://app.example.com", "app.example.com"),
        ("https://app.example.com", "app.example.com:443"),
        ("https://app.example.com:443", "app.example.com"),
        ("http://app.example.com", "app.example.com:80"),
        ("https://app.example.com:8443", "app.example.com:8443"),
        ("https://app.example.com", "APP.Example.COM"),
        ("HTTPS://APP.EXAMPLE.COM", "app.example.com"),
        ("https://app.example.com.", "app.example.com"),
        ("https://app.example.com", "app.example.com.:443"),
        ("https://app.example.com", "app.example.com:"),
        ("http://localhost:8000", "localhost:8000"),
        ("http://127.0.0.1:8000", "127.0.0.1:8000"),
        ("http://[::1]:8000", "[::1]:8000"),
        ("http://[::1]", "[0:0:0:0:0:0:0:1]:80"),
        ("https://my_app.example.com", "my_app.example.com"),
        ("https://xn--bcher-kva.example", "xn--bcher-kva.example"),
    ],
)
def test_same_origin_is_accepted(origin: str, host: str) -> None:
    """An origin with the host and port of the server is accepted in any spelling; the default port may be missing."""
    assert OriginPolicy(None).problem([origin], [host]) is None


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("https://evil.example", "app.example.com"),
        ("https://app.example.com.evil.example", "app.example.com"),
        ("https://sub.app.example.com", "app.example.com"),
        ("https://example.com", "app.example.com"),
        ("https://app.example.com:8443", "app.example.com"),
        ("https://app.example.com", "app.example.com:8443"),
        ("http://app.example.com", "app.example.com:443"),
        ("https://app.example.com", "app.example.com:80"),
        ("http://[::1]:8000", "[::2]:8000"),
        ("chrome-extension://app.example.com", "app.example.com"),
        ("file://", ""),
        ("https://app.example.com", ""),
        ("https://app.example.com", "app.example.com, app.example.com"),
        ("https://app.example.com", "user@app.example.com"),
        ("https://kb.example.com", "\u212ab.example.com"),
        pytest.param("https://app.example.com", "app.example.com" + "." * 1_000_000, id="megabyte"),
    ],
)
def test_other_origin_is_foreign(origin: str, host: str) -> None:
    """An origin with another host, port or scheme is foreign, and so is each origin if the own host is invalid."""
    assert OriginPolicy(None).problem([origin], [host]) == "foreign"


def test_each_own_host_counts_as_same_origin() -> None:
    """The requested host and the host that a proxy forwards both count as the same origin."""
    policy = OriginPolicy([])
    assert policy.problem(["https://app.example.com"], ["backend:8000", "app.example.com"]) is None
    assert policy.problem(["http://backend:8000"], ["backend:8000", "app.example.com"]) is None
    assert policy.problem(["http://backend:8000"], []) == "foreign"


# ── missing and malformed origins ──


def test_missing_origin_is_accepted_unless_required() -> None:
    """A client without an Origin header is accepted, or has the problem "missing" if an origin is required."""
    assert OriginPolicy(None).problem([], OWN_HOSTS) is None
    assert OriginPolicy(["*"], required=True).problem([], OWN_HOSTS) == "missing"
    assert OriginPolicy(None, required=True).problem(["https://app.example.com"], OWN_HOSTS) is None


@pytest.mark.parametrize(
    "allowed", [[], ["https://app.example.com"], [re.compile("https?://.*")], ["^https://.*"]], ids=str
)
def test_null_origin_is_rejected_unless_listed(allowed: list[str | re.Pattern[str]]) -> None:
    """The null origin, which any page can produce, is rejected unless an entry matches it."""
    assert OriginPolicy(allowed).problem(["null"], ["null"]) == "null"


def test_listed_null_origin_is_accepted() -> None:
    """The entry `"null"` accepts the null origin only; `"*"` and a matching pattern accept it too."""
    assert problem("null", "null") is None
    assert problem("null", "*") is None
    assert problem("null", "^null$") is None
    assert problem("null", re.compile(".*")) is None
    assert problem("https://evil.example", "null") == "foreign"


@pytest.mark.parametrize("second", ["https://app.example.com", "https://evil.example"])
def test_repeated_origin_header_is_rejected(second: str) -> None:
    """A repeated Origin header is rejected, even with equal values, except under `"*"`."""
    origins = ["https://app.example.com", second]
    assert OriginPolicy(None).problem(origins, OWN_HOSTS) == "several"
    assert OriginPolicy(["^.*$"]).problem(origins, OWN_HOSTS) == "several"
    assert OriginPolicy(["*"]).problem(origins, OWN_HOSTS) is None


@pytest.mark.parametrize(
    "origin",
    [
        "",
        " ",
        "*",
        "Null",
        "app.example.com",
        "//app.example.com",
        "://app.example.com",
        "https://",
        "https:app.example.com",
        "https://app.example.com/",
        "https://app.example.com/path",
        "https://app.example.com?query",
        "https://app.example.com#fragment",
        "https://app.example.com\\",
        "https://user@app.example.com",
        "https://user:pass@app.example.com",
        "https://app.example.com https://evil.example",
        "https://app.example.com,https://evil.example",
        " https://app.example.com",
        "https://app.example.com ",
        "https://app.example.com\n",
        "https://app.example.com\x00",
        "https://app.example.com\r\nHost: evil",
        "https://app\t.example.com",
        "https://app.example.com\x7f",
        "ht tps://app.example.com",
        "1https://app.example.com",
        "https://*.example.com",
        "https://app..example.com",
        "https://.example.com",
        "https://app.example.com..",
        "https://.",
        "https://app.example.com:http",
        "https://app.example.com:-1",
        "https://app.example.com:+443",
        "https://app.example.com:4_43",
        "https://app.example.com:0",
        "https://app.example.com:65536",
        "https://app.example.com:000443",
        "https://app.example.com:443:443",
        "https://::1",
        "https://[::1",
        "https://[::1]443",
        "https://[::1]:x",
        "https://[evil]",
        "https://[]",
        "https://[fe80::1%eth0]",
        "https://app%2eexample.com",
        "https://b\xfccher.example",
        "https://app.example.com:\u0664\u0664\u0663",
        "https://\u212aelvin.example",
        pytest.param("https://" + "a" * 254, id="long label"),
        pytest.param("https://" + ".".join(["a"] * 128), id="many labels"),
    ],
)
def test_invalid_origin_is_malformed(origin: str) -> None:
    """A text that no browser sends as an origin is malformed, even if it begins with a listed origin."""
    policy = OriginPolicy(["https://app.example.com", "https://*.example.com", "null"])
    assert policy.problem([origin], [origin, *OWN_HOSTS]) == "malformed"


@pytest.mark.parametrize(
    "origin",
    [
        "https://github.com/gilmaimon/TinyWebsockets",
        "file://",
        "null",
        "",
        "app.example.com",
        "https://b\xfccher.example",
        "https://app.example.com:443:443",
        pytest.param("https://a" + "a" * 1_000_000, id="megabyte"),
    ],
)
def test_asterisk_accepts_every_origin_header(origin: str) -> None:
    """`"*"` accepts each client, whatever its Origin header is."""
    assert problem(origin, "*", hosts=OWN_HOSTS) is None


@pytest.mark.parametrize(
    ("pattern", "origin"),
    [
        (r"^https://github\.com/gilmaimon/TinyWebsockets$", "https://github.com/gilmaimon/TinyWebsockets"),
        (r"^https://[^/]+/device/[0-9]+$", "https://Vendor.example/device/5"),
        (r"^https://APP\.example\.com:443$", "https://APP.example.com:443"),
        (r"^file:///[a-z_]+t$", "file:///android_asset"),
        (r"^$", ""),
    ],
)
def test_pattern_matching_raw_origin_accepts_it(pattern: str, origin: str) -> None:
    """A pattern that matches the whole text of an Origin header accepts it, even if it is no valid origin."""
    assert problem(origin, pattern, hosts=OWN_HOSTS) is None
    assert problem(origin, re.compile(pattern), hosts=OWN_HOSTS) is None
    assert problem(f"{origin}x", pattern, hosts=OWN_HOSTS) in ("malformed", "foreign")


@pytest.mark.parametrize("piece", ["a", ".a", ".", ":1", " ", "\x00"])
def test_origin_over_maximum_length_is_malformed(piece: str) -> None:
    """An origin above the maximum length is malformed."""
    tail = piece * 1_000_000
    assert problem(f"https://a{tail}", "^.*$", hosts=[f"a{tail}"]) == "malformed"


def test_longest_valid_origin_is_accepted() -> None:
    """A host of 253 characters, the DNS maximum, is accepted with its scheme and port."""
    host = ".".join(["a" * 62] * 4) + ".b"
    assert len(host) == 253
    assert problem(f"https://{host}:65535", hosts=[f"{host}:65535"]) is None
    assert problem(f"https://{host}.:65535", hosts=[f"{host}:65535"]) is None


@given(st.text(max_size=30) | st.text("htps:/.[]@%*x1", max_size=20).map("https://".__add__), st.text(max_size=30))
def test_arbitrary_origin_raises_nothing(origin: str, host: str) -> None:
    """No header raises, and only own or listed origins are accepted."""
    assert problem(origin, "https://app.example.com", hosts=["app.example.com"]) in ("foreign", "malformed", "null")
    assert problem("https://app.example.com", hosts=[host, origin]) == "foreign"


# ── allowed origins ──


@pytest.mark.parametrize(
    ("entry", "origin"),
    [
        ("https://app.example.com", "https://app.example.com"),
        ("HTTPS://App.Example.COM.", "https://app.example.com"),
        ("https://app.example.com:443", "https://app.example.com"),
        ("http://app.example.com", "http://app.example.com:80"),
        ("http://localhost:3000", "http://localhost:3000"),
        ("http://[0::1]:3000", "http://[::1]:3000"),
        ("http://192.168.0.7", "http://192.168.0.7"),
        ("chrome-extension://abcdefghijklmnop", "chrome-extension://abcdefghijklmnop"),
        (
            "moz-extension://0a1b2c3d-0000-4000-8000-000000000000",
            "moz-extension://0a1b2c3d-0000-4000-8000-000000000000",
        ),
        ("capacitor://localhost", "capacitor://localhost"),
        ("app://-", "app://-"),
        ("file://", "file://"),
        ("https://b\xfccher.example", "https://xn--bcher-kva.example"),
        ("https://B\xdcCHER.example:8443", "https://xn--bcher-kva.example:8443"),
        ("https://bu\u0308cher.example", "https://xn--bcher-kva.example"),
        ("https://xn--bcher-kva.example", "https://xn--bcher-kva.example"),
    ],
)
def test_listed_origin_is_accepted_in_any_spelling(entry: str, origin: str) -> None:
    """A listed origin is accepted in any spelling."""
    assert problem(origin, "https://other.example", entry) is None


@pytest.mark.parametrize(
    "origin",
    [
        "http://app.example.com",
        "https://app.example.com:8443",
        "https://app.example.com:80",
        "https://sub.app.example.com",
        "https://example.com",
        "https://evil-app.example.com",
        "https://app.example.com.evil.example",
        "https://appxexample.com",
        "chrome-extension://app.example.com",
    ],
)
def test_unlisted_origin_is_foreign(origin: str) -> None:
    """An origin is listed only with its scheme, host and port."""
    assert problem(origin, "https://app.example.com") == "foreign"


def test_same_origin_is_accepted_beside_list() -> None:
    """The list is added to the same origin."""
    assert OriginPolicy(["https://other.example"]).problem(["https://app.example.com"], OWN_HOSTS) is None


@pytest.mark.parametrize("origin", ["https://evil.example", "http://1.2.3.4:5", "chrome-extension://abc", "file://"])
def test_asterisk_accepts_every_origin(origin: str) -> None:
    """`"*"` accepts each origin."""
    assert problem(origin, "*") is None


@pytest.mark.parametrize(
    ("entry", "origin"),
    [
        ("https://*.example.com", "https://app.example.com"),
        ("https://*.example.com", "https://a.b.c.example.com"),
        ("https://*.example.com", "https://app.example.com:443"),
        ("https://*.EXAMPLE.com.", "https://app.Example.com."),
        ("https://*.example.com:8443", "https://app.example.com:8443"),
        ("http://*.localhost:3000", "http://app.localhost:3000"),
        ("https://*.b\xfccher.example", "https://app.xn--bcher-kva.example"),
    ],
)
def test_wildcard_accepts_subdomains(entry: str, origin: str) -> None:
    """A wildcard stands for one or more labels."""
    assert problem(origin, entry) is None


@pytest.mark.parametrize(
    ("origin", "word"),
    [
        ("https://example.com", "foreign"),
        ("https://evil-example.com", "foreign"),
        ("https://evilexample.com", "foreign"),
        ("https://app.example.com.evil.example", "foreign"),
        ("https://app.example.comevil", "foreign"),
        ("https://appxexample.com", "foreign"),
        ("http://app.example.com", "foreign"),
        ("https://app.example.com:8443", "foreign"),
        ("https://.example.com", "malformed"),
        ("https://a..example.com", "malformed"),
        ("https://evil.example/.example.com", "malformed"),
        ("https://evil.example?.example.com", "malformed"),
        ("https://evil.example#.example.com", "malformed"),
        ("https://evil.example\\.example.com", "malformed"),
        ("https://evil.example%00.example.com", "malformed"),
        ("https://evil.example,.example.com", "malformed"),
        ("https://evil.example`.example.com", "malformed"),
        ("https://evil.example@app.example.com", "malformed"),
    ],
)
def test_wildcard_rejects_all_but_subdomains(origin: str, word: str) -> None:
    """A wildcard does not match its own domain, a domain with a similar ending, or another scheme or port."""
    assert problem(origin, "https://*.example.com") == word


@pytest.mark.parametrize(
    "pattern",
    [r"^https://(app|www)\.example\.com(:\d+)?$", re.compile(r"https://(app|www)\.example\.com(:\d+)?")],
    ids=["text", "compiled"],
)
def test_pattern_must_match_whole_origin(pattern: str | re.Pattern[str]) -> None:
    """A pattern has to match the whole normalized origin."""
    assert problem("https://app.example.com", pattern) is None
    assert problem("HTTPS://WWW.EXAMPLE.COM.:443", pattern) is None
    assert problem("https://app.example.com:8443", pattern) is None
    assert problem("https://app.example.com.evil.example", pattern) == "foreign"
    assert problem("https://api.example.com", pattern) == "foreign"


def test_pattern_is_matched_against_normalized_origin() -> None:
    """A normalized origin has no default port and no trailing dot, and an IPv6 address is in brackets."""
    assert problem("HTTPS://App.Example.com.:443", "^https://app\\.example\\.com") is None
    assert problem("http://[0:0::1]:3000", r"^http://\[::1\]:3000") is None
    assert problem("FILE://", "^file://") is None


def test_pattern_is_not_run_on_long_origin() -> None:
    """A pattern is not run on an origin above the maximum length, so that a slow pattern cannot block."""
    longest = "x" * (MAX_ORIGIN_CHARS - len("https://a") - 1)
    seen = re.compile(r".*")
    assert problem(f"{longest}https://a", seen) is None
    assert problem(f"x{longest}https://a", seen) == "malformed"


# ── invalid entries ──


@pytest.mark.parametrize(
    ("entry", "advice"),
    [
        ("app.example.com", "has no scheme: write 'https://app.example.com'"),
        ("*.example.com", "has no scheme: write 'https://*.example.com'"),
        ("localhost:3000", "has no scheme: write 'https://localhost:3000'"),
        ("", "has no scheme"),
        ("https://app.example.com/", "has text after its host: write 'https://app.example.com'"),
        ("https://app.example.com:8443/path", "has text after its host: write 'https://app.example.com:8443'"),
        ("https://app.example.com?query", "has text after its host"),
        ("https://app.example.com#fragment", "has text after its host"),
        ("https://*.example.com/", "has text after its host: write 'https://*.example.com'"),
        ("https://a.example,https://b.example", "write a list with one origin each"),
        ("https://a.example https://b.example", "write a list with one origin each"),
        (" https://a.example", "write a list with one origin each"),
        ("wss://app.example.com", "'https://app.example.com'"),
        ("WS://app.example.com:8000", "'http://app.example.com:8000'"),
        ("https://*", "has a misplaced *"),
        ("*://app.example.com", "has a misplaced *"),
        ("https://app.*.com", "has a misplaced *"),
        ("https://*app.example.com", "has a misplaced *"),
        ("https://*.*.example.com", "has a misplaced *"),
        ("https://app.example.com:*", "has a misplaced *"),
        (r"https://.*\.example\.com", "a regular expression that begins with ^"),
        ("https://*.com", "is too broad"),
        ("https://*.com.", "is too broad"),
        ("https://*.0.0.1", "is too broad"),
        ("https://*.[::1]", "is too broad"),
        ("https://*.[::ffff:1.2.3.4]", "is too broad"),
        ("app://*.", "is not an origin"),
        ("https://", "is not an origin"),
        ("https://app..example.com", "is not an origin"),
        ("https://app.example.com:99999", "is not an origin"),
        ("https://[evil]", "is not an origin"),
        ("https://\u212aelvin.example:\u0664", "is not an origin"),
        ("https://stra\xdfe.example", "write its host as browsers send it, 'xn--...'"),
        ("https://b\xfc..example", "write its host as browsers send it, 'xn--...'"),
        ("^https://(app", "is a broken regular expression: missing )"),
    ],
)
def test_invalid_allowed_origin_raises(entry: str, advice: str) -> None:
    """An invalid entry raises at once, with the entry to write instead."""
    with pytest.raises(ValueError, match=re.escape(advice)) as caught:
        OriginPolicy(["https://app.example.com", entry])
    assert repr(entry) in str(caught.value)


def test_password_in_allowed_origin_is_not_shown() -> None:
    """An entry with a user raises, and the error does not show the password."""
    with pytest.raises(ValueError, match="has user information before its host") as caught:
        OriginPolicy(["https://ann:se cret@app.example.com"])
    assert "cret" not in str(caught.value)


def test_allowed_origins_as_string_raise() -> None:
    """A single string instead of a list raises."""
    with pytest.raises(ValueError, match=re.escape("write ['*']")):
        OriginPolicy("*")


def test_bytes_pattern_raises() -> None:
    """A pattern of bytes raises, because it matches no text."""
    with pytest.raises(ValueError, match="use a str pattern"):
        OriginPolicy([re.compile(b"https://.*")])  # type: ignore[list-item]
