"""Tests of the platforms, and of the options derived from them."""

from __future__ import annotations

import dataclasses
import itertools
from datetime import date
from urllib.parse import urlsplit

import pytest
from pydantic import ValidationError

from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.errors import UnknownPlatformError, UnsupportedPlatformError
from fastapi_ws_stabilizer.hub.reaper import DRAIN_LEAD
from fastapi_ws_stabilizer.platforms import clouds, hop, proxies
from fastapi_ws_stabilizer.platforms import paas as hosts
from fastapi_ws_stabilizer.platforms.options import UPPER_BOUNDED_OPTIONS, derive_options, resolve_hops
from fastapi_ws_stabilizer.platforms.platform import Fact, Platform
from fastapi_ws_stabilizer.platforms.registry import PLATFORMS

FACTS = [
    pytest.param(fact, id=f"{platform.name}-{number}")
    for platform in PLATFORMS.values()
    for number, fact in enumerate(platform.facts)
]
VALUES = ("idle_timeout", "max_lifetime", "grace", "unsupported_reason")
USABLE = [name for name, platform in PLATFORMS.items() if platform.unsupported_reason is None]
REFUSED = [name for name, platform in PLATFORMS.items() if platform.unsupported_reason is not None]
DEFAULTS = WebSocketConfig()


def a_hop(idle_timeout: float | None = None, max_lifetime: float | None = None, grace: float | None = None) -> Platform:
    """Return a platform that is not in the table."""
    return Platform("hop", "Hop", (), idle_timeout, max_lifetime, grace)


def options(*path: Platform) -> dict[str, float]:
    """Return the options of a path, with the limits of the config."""
    return derive_options(path, {name: getattr(DEFAULTS, name) for name in UPPER_BOUNDED_OPTIONS})


# ── the facts ──


@pytest.mark.parametrize("fact", FACTS)
def test_every_fact_has_source_and_date(fact: Fact) -> None:
    """A fact has an https address, the date on which it was read, and a sentence."""
    source = urlsplit(fact.source)
    assert source.scheme == "https"
    assert "." in source.netloc
    assert date.fromisoformat(fact.checked).isoformat() == fact.checked
    assert fact.statement.endswith(".")
    assert "|" not in fact.statement, "it is in a table"


@pytest.mark.parametrize("platform", PLATFORMS.values(), ids=lambda platform: platform.name)
def test_platform_values_and_facts_match(platform: Platform) -> None:
    """Every value has a fact, every fact is about a value that is set, and every platform has at least one."""
    about = {fact.about for fact in platform.facts} - {"note"}
    assert about == {value for value in VALUES if getattr(platform, value) is not None}
    assert platform.facts


@pytest.mark.parametrize("platform", PLATFORMS.values(), ids=lambda platform: platform.name)
def test_platform_names_are_lowercase_with_hyphens(platform: Platform) -> None:
    """A name consists of lowercase letters and hyphens, and is its key in the table."""
    assert PLATFORMS[platform.name] is platform
    assert platform.name == platform.name.lower().replace("_", "-")
    assert platform.title


def test_platform_names_are_unique() -> None:
    """Each definition is in the table: a second one with the same name would hide the first."""
    defined = (*proxies.PROXIES, *clouds.AMAZON, *clouds.AZURE, *clouds.GOOGLE, *hosts.HOSTS)
    assert list(PLATFORMS.values()) == list(defined)


def test_platforms_are_immutable() -> None:
    """Platforms are frozen, and so is their table."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        PLATFORMS["nginx"].idle_timeout = 1.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        PLATFORMS["nginx"] = a_hop()  # type: ignore[index]


# ── the rules ──


@pytest.mark.parametrize(
    ("idle_timeout", "interval"), [(20.0, 8.0), (30.0, 12.0), (55.0, 22.0), (60.0, 24.0), (75.0, 30.0), (350.0, 30.0)]
)
def test_heartbeat_fits_twice_into_idle_timeout(idle_timeout: float, interval: float) -> None:
    """The interval is 0.4 of the idle timeout, and at most the default."""
    assert options(a_hop(idle_timeout=idle_timeout)) == {"heartbeat_interval": pytest.approx(interval)}


@pytest.mark.parametrize(
    ("cut", "lifetime"), [(30.0, 27.0), (300.0, 270.0), (3600.0, 3540.0), (14400.0, 14340.0), (86400.0, 86340.0)]
)
def test_lifetime_closes_before_platform_limit(cut: float, lifetime: float) -> None:
    """A lifetime ends a tenth earlier, at most a minute; clients that are asked to reconnect have that time."""
    assert options(a_hop(max_lifetime=cut)) == {"max_lifetime": pytest.approx(lifetime)}
    assert cut - lifetime > DRAIN_LEAD


@pytest.mark.parametrize(
    ("grace", "window", "timeout"),
    [(0.0, 0.0, 0.1), (5.0, 1.7, 3.1), (10.0, 3.3, 6.7), (30.0, 10.0, 20.0), (120.0, 10.0, 30.0)],
)
def test_drain_fits_into_shutdown_grace(grace: float, window: float, timeout: float) -> None:
    """The closes get a third of the grace and the whole drain two thirds, at most the defaults."""
    fitting = options(a_hop(grace=grace))
    assert fitting == {"drain_window": pytest.approx(window), "drain_timeout": pytest.approx(timeout)}


def test_undocumented_hop_sets_no_option() -> None:
    """A hop without values sets no option, and does not affect other hops."""
    assert options(a_hop()) == {}
    assert options(a_hop(), a_hop(idle_timeout=60.0)) == options(a_hop(idle_timeout=60.0))


def test_smallest_value_of_each_kind_applies() -> None:
    """Idle timeout, lifetime and grace may each come from a different hop."""
    path = (a_hop(20.0, 600.0, 30.0), a_hop(60.0, 300.0, 10.0), a_hop(30.0, 900.0, 0.0))
    smallest = options(a_hop(20.0, 300.0, 0.0))
    assert {options(*order) == smallest for order in itertools.permutations(path)} == {True}


# ── a config ──


@pytest.mark.parametrize("name", USABLE)
def test_every_platform_creates_safe_config(name: str) -> None:
    """Only the options for which a platform has a value are set, with a safety margin."""
    config = WebSocketConfig.for_platform(name)
    platform = PLATFORMS[name]
    expected = {
        "heartbeat_interval": platform.idle_timeout is not None,
        "max_lifetime": platform.max_lifetime is not None,
        "drain_window": platform.grace is not None,
        "drain_timeout": platform.grace is not None,
    }
    assert config.model_fields_set == {option for option, is_set in expected.items() if is_set}
    assert config.heartbeat_interval <= DEFAULTS.heartbeat_interval
    assert platform.idle_timeout is None or config.heartbeat_interval < platform.idle_timeout / 2
    assert platform.max_lifetime is None or (config.max_lifetime or 0.0) < platform.max_lifetime
    assert config.drain_window <= DEFAULTS.drain_window
    assert platform.grace is None or config.drain_window <= platform.grace / 2


def test_path_takes_strictest_value_of_each_option() -> None:
    """Each option comes from the hop with the strictest value; all other options are the defaults."""
    config = WebSocketConfig.for_platform("azure-front-door", "nginx", "istio", "kubernetes")
    assert config.heartbeat_interval == pytest.approx(24.0)  # nginx
    assert config.max_lifetime == pytest.approx(14340.0)  # Front Door
    assert config.drain_window == pytest.approx(1.7)  # the sidecar
    assert config.changed_options() == {"heartbeat_interval", "max_lifetime", "drain_window", "drain_timeout"}


def test_hop_order_does_not_change_config() -> None:
    """A path and its reverse make the same config."""
    path = ("google-alb", "ingress-nginx", "kubernetes", "istio")
    configs = [WebSocketConfig.for_platform(*order) for order in itertools.permutations(path)]
    assert all(config == configs[0] for config in configs)


def test_undocumented_platform_gives_default_config() -> None:
    """The config is the default one."""
    assert WebSocketConfig.for_platform("cloudflare") == DEFAULTS


@pytest.mark.parametrize("name", ["AWS-ALB", "aws_alb", "Aws_Alb"])
def test_platform_lookup_ignores_case_and_underscores(name: str) -> None:
    """Case and underscores do not matter."""
    assert resolve_hops(name) == (PLATFORMS["aws-alb"],)


def test_path_preserves_hop_order() -> None:
    """The client's side is first, and a hop may occur twice."""
    assert [platform.name for platform in resolve_hops("nginx", "istio", "nginx")] == ["nginx", "istio", "nginx"]


def test_overrides_take_precedence_over_platforms() -> None:
    """An override takes precedence, even if it removes a limit, and other options can be added."""
    config = WebSocketConfig.for_platform(
        "google-cloud-run", "nginx", heartbeat_interval=5, max_lifetime=None, on_duplicate="allow"
    )
    assert (config.heartbeat_interval, config.max_lifetime, config.on_duplicate) == (5.0, None, "allow")
    assert config.drain_window == pytest.approx(3.3)


def test_environment_takes_precedence_over_platforms() -> None:
    """Options of `from_env` override those of the platforms; others keep the platforms' values."""
    read = WebSocketConfig.from_env(
        environ={"WS_HEARTBEAT_INTERVAL": "7", "WS_RECONNECT_SECRET": "0123456789abcdef", "WS_LOG_LEVEL": "debug"}
    )
    config = WebSocketConfig.for_platform("nginx", "istio", **read.model_dump(exclude_unset=True))
    assert (config.heartbeat_interval, config.log_level) == (7.0, "DEBUG")
    assert config.reconnect_secret == read.reconnect_secret
    assert config.drain_window == pytest.approx(1.7)


def test_invalid_override_is_rejected() -> None:
    """An invalid value and an unknown option are rejected."""
    with pytest.raises(ValidationError, match="heartbeat_interval"):
        WebSocketConfig.for_platform("nginx", heartbeat_interval=0)
    with pytest.raises(ValidationError, match="did you mean 'heartbeat_interval'"):
        WebSocketConfig.for_platform("nginx", heartbeat_intervall=5)


def test_config_subclass_retains_shorter_default() -> None:
    """A config subclass with a shorter default interval never gets a longer one."""

    class Quick(WebSocketConfig):
        heartbeat_interval: float = 10.0

    config = Quick.for_platform("nginx")
    assert type(config) is Quick
    assert config.heartbeat_interval == 10.0


# ── rejections ──


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_platform_is_rejected_with_reason(name: str) -> None:
    """The error names the platform and the reason, at any position in the path."""
    for path in ((name,), ("nginx", name), (name, "nginx")):
        with pytest.raises(UnsupportedPlatformError) as caught:
            WebSocketConfig.for_platform(*path)
        assert caught.value.name == name
        assert caught.value.unsupported_reason == PLATFORMS[name].unsupported_reason
        assert name in str(caught.value)
        assert caught.value.unsupported_reason in str(caught.value)


def test_unsupported_platforms_match_documentation() -> None:
    """They are the platforms on which, by their documentation, no process of the user holds the socket."""
    assert REFUSED == ["aws-alb-lambda", "aws-api-gateway", "google-app-engine-standard"]


@pytest.mark.parametrize(
    ("name", "similar"), [("ngnix", "nginx"), ("aws-albs", "aws-alb"), ("CLOUD_RUN", "google-cloud-run"), ("zzz", None)]
)
def test_unknown_platform_error_lists_known_names(name: str, similar: str | None) -> None:
    """The error lists all names, and suggests the likely one."""
    with pytest.raises(UnknownPlatformError) as unknown:
        WebSocketConfig.for_platform("nginx", name)
    assert (unknown.value.name, unknown.value.similar) == (name, similar)
    assert unknown.value.known == tuple(sorted(PLATFORMS))
    assert all(known in str(unknown.value) for known in PLATFORMS)
    assert (f"did you mean {similar!r}?" in str(unknown.value)) == (similar is not None)


def test_empty_path_raises() -> None:
    """An empty path is more likely a mistake than a request for the defaults."""
    with pytest.raises(ValueError, match="at least one hop"):
        WebSocketConfig.for_platform(heartbeat_interval=5)


# ── modified platforms ──


def test_modified_platform_uses_its_own_values() -> None:
    """The facts of the modified platform stay, and the smallest value still applies."""
    config = WebSocketConfig.for_platform("aws-alb", hop("nginx", idle_timeout=20))
    assert config.heartbeat_interval == 8
    assert WebSocketConfig.for_platform(hop("nginx", idle_timeout=None)).heartbeat_interval == 30
    assert WebSocketConfig.for_platform(hop("nginx", max_lifetime=600)).max_lifetime == 540


@pytest.mark.parametrize(
    ("name", "values", "problem"),
    [
        ("nginx", {"timeout": 3}, "a platform has no timeout, only idle_timeout, max_lifetime, grace"),
        ("nginx", {"grace": 0}, "grace must be a number of seconds above zero, not 0"),
        ("ngins", {"grace": 1}, "ngins"),
        ("aws-api-gateway", {"grace": 1}, "the gateway holds the socket itself"),
    ],
)
def test_invalid_platform_change_raises(name: str, values: dict[str, float], problem: str) -> None:
    """The error describes the problem."""
    with pytest.raises(ValueError, match=problem):
        hop(name, **values)
