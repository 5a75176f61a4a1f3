"""Tests of the options."""

from __future__ import annotations

import logging
import re
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fastapi_ws_stabilizer.config import (
    CompressionMode,
    DuplicatePolicy,
    HeartbeatType,
    InboxOverflow,
    MemoryEvictionPolicy,
    WebSocketConfig,
)

SECONDS = ["heartbeat_interval", "heartbeat_timeout", "disconnect_grace", "send_timeout", "memory_check_interval"]
COUNTS = [
    "max_message_size",
    "inbox_max_messages",
    "inbox_max_bytes",
    "outbox_max_messages",
    "outbox_max_bytes",
    "num_shards",
    "max_concurrent_cleanup",
    "max_concurrent_broadcast",
]
OPTIONAL_COUNTS = [
    "max_connections",
    "max_bad_messages",
    "max_memory_per_connection",
    "max_total_memory",
    "unsent_low_water_bytes",
]
WORDS = {
    "heartbeat_type": ("ping", "custom", "off"),
    "on_duplicate": ("replace", "reject", "allow"),
    "inbox_overflow": ("pause", "close"),
    "compression": ("deflate", "none"),
    "memory_eviction_policy": ("lru", "fifo", "oldest"),
    "log_level": ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"),
    "gc_pacing": ("auto", "off"),
}


@pytest.mark.parametrize(
    ("option", "default"),
    [
        ("heartbeat_interval", 30.0),
        ("heartbeat_timeout", 60.0),
        ("heartbeat_type", "ping"),
        ("max_connections", None),
        ("max_message_size", 1048576),
        ("reconnect_token_ttl", timedelta(hours=1)),
        ("enable_reconnect", True),
        ("compression", "deflate"),
        ("log_level", "INFO"),
        ("enable_metrics", False),
        ("num_shards", 16),
        ("max_concurrent_cleanup", 100),
        ("max_concurrent_broadcast", 1000),
        ("max_memory_per_connection", None),
        ("max_total_memory", None),
        ("memory_eviction_policy", "lru"),
        ("memory_check_interval", 60.0),
        ("gc_pacing", "auto"),
    ],
)
def test_options_have_documented_defaults(option: str, default: Any) -> None:
    """Every documented option exists, with its documented default."""
    assert getattr(WebSocketConfig(), option) == default


@pytest.mark.parametrize("option", SECONDS)
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), float("-inf"), True, "soon", None])
def test_invalid_duration_names_option(option: str, value: Any) -> None:
    """Zero, negative, nan, infinite and other invalid durations are an error that names the option."""
    with pytest.raises(ValidationError, match=option):
        WebSocketConfig(**{option: value})


@pytest.mark.parametrize("option", COUNTS + OPTIONAL_COUNTS)
@pytest.mark.parametrize("value", [0, -1, 1.5, float("nan"), float("inf"), True, "many"])
def test_invalid_count_names_option(option: str, value: Any) -> None:
    """Zero, negative and other invalid counts are an error that names the option."""
    with pytest.raises(ValidationError, match=option):
        WebSocketConfig(**{option: value})


@pytest.mark.parametrize("option", OPTIONAL_COUNTS)
def test_none_means_no_limit(option: str) -> None:
    """`None` disables a limit."""
    assert getattr(WebSocketConfig(**{option: None}), option) is None


@pytest.mark.parametrize(("option", "words"), WORDS.items())
def test_invalid_choice_lists_allowed_values(option: str, words: tuple[str, ...]) -> None:
    """The error names the option and every allowed value."""
    with pytest.raises(ValidationError) as caught:
        WebSocketConfig(**{option: "nonsense"})
    assert option in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(("option", "words"), WORDS.items())
def test_choices_are_case_insensitive(option: str, words: tuple[str, ...]) -> None:
    """`"PING"`, `"ping"` and the member of the enum are equivalent."""
    for word in words:
        given_with = {"heartbeat_payload": "beat"} if word == "custom" else {}
        for spelling in (word, word.upper(), word.lower()):
            assert getattr(WebSocketConfig(**{option: spelling}, **given_with), option) == word


def test_enum_members_are_accepted() -> None:
    """An option with an enum takes its members."""
    config = WebSocketConfig(
        heartbeat_type=HeartbeatType.OFF,
        on_duplicate=DuplicatePolicy.ALLOW,
        inbox_overflow=InboxOverflow.CLOSE,
        compression=CompressionMode.NONE,
        memory_eviction_policy=MemoryEvictionPolicy.OLDEST,
    )
    assert config.on_duplicate is DuplicatePolicy.ALLOW
    assert config.memory_eviction_policy is MemoryEvictionPolicy.OLDEST


@pytest.mark.parametrize("value", ["zstd", "deflat", 1])
def test_unknown_compression_is_rejected(value: Any) -> None:
    """An unknown compression is an error."""
    with pytest.raises(ValidationError, match="compression"):
        WebSocketConfig(compression=value)


def test_unknown_option_is_rejected_with_hint() -> None:
    """An unknown option is an error that suggests the likely one."""
    with pytest.raises(ValidationError, match="no option 'heartbeat_intervall'; did you mean 'heartbeat_interval'"):
        WebSocketConfig(heartbeat_intervall=5)
    with pytest.raises(ValidationError, match=r"no option 'xyzzy'(?!; did)"):
        WebSocketConfig(xyzzy=5)


def test_config_from_non_mapping_raises() -> None:
    """A value that is not a mapping of options raises a clear error."""
    with pytest.raises(ValidationError):
        WebSocketConfig.model_validate("heartbeat_interval=5")


def test_config_is_immutable() -> None:
    """A config is frozen, so the options of a running manager do not change."""
    config = WebSocketConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.heartbeat_interval = 5.0


def test_model_copy_validates_changes() -> None:
    """`model_copy` rejects the values that the constructor rejects."""
    with pytest.raises(ValueError, match="heartbeat_interval"):
        WebSocketConfig().model_copy(update={"heartbeat_interval": float("nan")})


def test_model_copy_changes_only_given_options() -> None:
    """`model_copy(update=...)` keeps the other options and the original."""
    config = WebSocketConfig(send_timeout=3)
    copy = config.model_copy(update={"heartbeat_interval": 5.0})
    assert (copy.heartbeat_interval, copy.send_timeout) == (5.0, 3.0)
    assert config.heartbeat_interval == 30.0


def test_custom_heartbeat_requires_payload() -> None:
    """`heartbeat_type="custom"` without a payload is an error, because there would be nothing to send."""
    with pytest.raises(ValidationError, match="heartbeat_payload"):
        WebSocketConfig(heartbeat_type="custom")


def test_payload_without_custom_heartbeat_is_rejected() -> None:
    """A payload that would never be sent is an error."""
    with pytest.raises(ValidationError, match="heartbeat_type='custom'"):
        WebSocketConfig(heartbeat_payload="beat")


@pytest.mark.parametrize("payload", ["beat", {"t": 1}, b"\x01", lambda ws: "beat"])
def test_custom_payload_is_unchanged(payload: Any) -> None:
    """Any message, or a function of the socket, can be the payload."""
    assert WebSocketConfig(heartbeat_type="custom", heartbeat_payload=payload).heartbeat_payload is payload


@pytest.mark.parametrize(
    ("value", "meaning"),
    [("auto", "auto"), ("AUTO", "auto"), (True, True), ("true", True), ("No", False), ("0", False), (False, False)],
)
def test_require_pong_accepts_auto_true_and_false(value: Any, meaning: Any) -> None:
    """`require_pong` is `"auto"`, true or false, also as text in an environment variable."""
    assert WebSocketConfig(require_pong=value).require_pong is meaning or meaning == "auto"
    assert WebSocketConfig(require_pong=value).require_pong == meaning


@pytest.mark.parametrize("value", ["sometimes", None, 7])
def test_require_pong_rejects_other_values(value: Any) -> None:
    """Another value of `require_pong` is an error that names the option."""
    with pytest.raises(ValidationError, match="require_pong"):
        WebSocketConfig(require_pong=value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("unsent_low_water_bytes", 1 << 31),
        ("write_buffer_high_water_bytes", 1 << 31),
        ("write_buffer_high_water_bytes", 0),  # with TLS, asyncio would pause an empty transport
        ("write_buffer_high_water_bytes", None),
        ("write_buffer_high_water_bytes", True),
    ],
)
def test_buffer_limits_fit_into_socket_option(option: str, value: Any) -> None:
    """A limit that no system or transport takes is an error that names the option."""
    with pytest.raises(ValidationError, match=option):
        WebSocketConfig(**{option: value})


@pytest.mark.parametrize("value", [timedelta(0), timedelta(seconds=-1), "later"])
def test_token_ttl_is_positive(value: Any) -> None:
    """The ttl of a token must be positive."""
    with pytest.raises(ValidationError, match="reconnect_token_ttl"):
        WebSocketConfig(reconnect_token_ttl=value)


def test_changed_options_excludes_defaults() -> None:
    """An option that is set to its default does not count as changed."""
    assert WebSocketConfig(num_shards=16).changed_options() == set()
    assert WebSocketConfig(num_shards=8, send_timeout=1).changed_options() == {"num_shards", "send_timeout"}


def test_heartbeat_interval_below_clock_resolution_is_rejected() -> None:
    """An interval that is too short for the clock's resolution is rejected, because it would never advance."""
    with pytest.raises(ValidationError, match="heartbeat_interval"):
        WebSocketConfig(heartbeat_interval=1e-300)


# ── from the environment ──


def test_from_env_reads_prefixed_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """`WS_HEARTBEAT_INTERVAL` in the process's environment is the option `heartbeat_interval`."""
    monkeypatch.setenv("WS_HEARTBEAT_INTERVAL", "5")
    monkeypatch.setenv("HEARTBEAT_TIMEOUT", "7")
    config = WebSocketConfig.from_env()
    assert (config.heartbeat_interval, config.heartbeat_timeout) == (5.0, 60.0)


def test_from_env_accepts_custom_prefix_and_any_case() -> None:
    """The prefix is configurable, and case does not matter."""
    config = WebSocketConfig.from_env("chat_", {"CHAT_Log_Level": "debug", "WS_NUM_SHARDS": "3"})
    assert (config.log_level, config.num_shards) == ("DEBUG", 16)


@pytest.mark.parametrize("text", ["", "none", "None", " null "])
def test_empty_variable_means_no_limit(text: str) -> None:
    """An empty variable disables a limit."""
    assert WebSocketConfig.from_env(environ={"WS_MAX_BAD_MESSAGES": text}).max_bad_messages is None


OPTIONAL = sorted(name for name, field in WebSocketConfig.model_fields.items() if field.default is None)


@pytest.mark.parametrize("option", OPTIONAL)
@pytest.mark.parametrize("text", ["", "none", "NONE", " null "])
def test_empty_or_none_variable_unsets_optional_option(option: str, text: str) -> None:
    """Each optional option is `None` when its variable is empty or `none`."""
    assert getattr(WebSocketConfig.from_env(environ={f"WS_{option.upper()}": text}), option) is None


@pytest.mark.parametrize("text", ["", "none", "null"])
def test_empty_trusted_proxies_variable_trusts_none(text: str) -> None:
    """An empty `WS_TRUSTED_PROXIES`, or `none`, is an empty list of proxies."""
    assert WebSocketConfig.from_env(environ={"WS_TRUSTED_PROXIES": text}).trusted_proxies == ()


def test_compression_variable_none_disables_compression() -> None:
    """`WS_COMPRESSION=none` disables compression, and does not count as an absent value."""
    assert WebSocketConfig.from_env(environ={"WS_COMPRESSION": "none"}).compression is CompressionMode.NONE


def test_token_ttl_variable_is_in_seconds() -> None:
    """`WS_RECONNECT_TOKEN_TTL` is a number of seconds."""
    config = WebSocketConfig.from_env(environ={"WS_RECONNECT_TOKEN_TTL": "90"})
    assert config.reconnect_token_ttl == timedelta(seconds=90)


@pytest.mark.parametrize("text", ["soon", "nan", "-5", "inf", "1e300"])
def test_invalid_token_ttl_variable_names_option(text: str) -> None:
    """An invalid duration is one clear error, regardless of Python's number formats."""
    with pytest.raises(ValidationError, match="reconnect_token_ttl"):
        WebSocketConfig.from_env(environ={"WS_RECONNECT_TOKEN_TTL": text})


@pytest.mark.parametrize(("name", "text"), [("WS_HEARTBEAT_INTERVAL", "nan"), ("WS_ON_DUPLICATE", "both")])
def test_invalid_variable_names_option(name: str, text: str) -> None:
    """The error about a variable names the option."""
    with pytest.raises(ValidationError, match=name[3:].lower()):
        WebSocketConfig.from_env(environ={name: text})


def test_foreign_variable_with_prefix_is_ignored(caplog: pytest.LogCaptureFixture) -> None:
    """A variable with the prefix that is not an option, such as those of Kubernetes, has no effect and no warning."""
    config = WebSocketConfig.from_env(environ={"WS_PORT_80_TCP_ADDR": "10.0.0.1", "WS_SERVICE_HOST": "x"})
    assert config == WebSocketConfig()
    assert not caplog.records


def test_misspelt_variable_warns_with_hint(caplog: pytest.LogCaptureFixture) -> None:
    """A variable similar to an option causes a warning with the likely option."""
    with caplog.at_level(logging.WARNING, logger="fastapi_ws_stabilizer"):
        WebSocketConfig.from_env(environ={"WS_HEARTBEAT_INTERVALL": "5"})
    assert "did you mean WS_HEARTBEAT_INTERVAL?" in caplog.text


_TEXTS = {
    "heartbeat_interval": st.floats(0.001, 1e6),
    "heartbeat_timeout": st.floats(0.001, 1e6),
    "require_pong": st.sampled_from(["auto", True, False]),
    "max_connections": st.none() | st.integers(1, 10**9),
    "on_duplicate": st.sampled_from(DuplicatePolicy),
    "inbox_overflow": st.sampled_from(InboxOverflow),
    "max_bad_messages": st.none() | st.integers(1, 10**9),
    "outbox_max_bytes": st.integers(1, 10**12),
    "reconnect_token_ttl": st.integers(1, 10**8).map(lambda seconds: timedelta(seconds=seconds)),
    "enable_reconnect": st.booleans(),
    "compression": st.sampled_from(CompressionMode),
    "log_level": st.sampled_from(WORDS["log_level"]),
    "gc_pacing": st.sampled_from(WORDS["gc_pacing"]),
    "memory_eviction_policy": st.sampled_from(MemoryEvictionPolicy),
}


def _as_text(value: Any) -> str:
    if isinstance(value, timedelta):
        return str(value.total_seconds())
    return str(getattr(value, "value", value))


@given(st.fixed_dictionaries({}, optional=_TEXTS), st.sampled_from(["WS_", "ws_", "CHAT_WS_"]))
def test_config_survives_round_trip_through_environment(options: dict[str, Any], prefix: str) -> None:
    """Options that are written to an environment and read back are equal."""
    environ = {f"{prefix}{name}".upper(): _as_text(value) for name, value in options.items()}
    assert WebSocketConfig.from_env(prefix, environ) == WebSocketConfig(**options)


def test_list_variables_are_comma_separated() -> None:
    """Names are separated by commas; a regular expression, which may contain commas, stands alone; `none` is empty."""
    environ = {"WS_TRUSTED_PROXIES": "10.0.0.0/8, ::1", "WS_ALLOWED_ORIGINS": "https://a.example,https://b.example"}
    config = WebSocketConfig.from_env(environ=environ)
    assert config.trusted_proxies == ("10.0.0.0/8", "::1")
    assert config.allowed_origins == ("https://a.example", "https://b.example")
    pattern = r"^https://[a-z]{1,8}\\.example\\.com$"
    config = WebSocketConfig.from_env(environ={"WS_TRUSTED_PROXIES": "none", "WS_ALLOWED_ORIGINS": pattern})
    assert (config.trusted_proxies, config.allowed_origins) == ((), (pattern,))
    assert WebSocketConfig.from_env(environ={"WS_ALLOWED_ORIGINS": "none"}).allowed_origins is None


@pytest.mark.parametrize("option", ["trusted_proxies", "allowed_origins"])
@pytest.mark.parametrize("many", [tuple, list])
def test_list_option_accepts_sequence_and_is_frozen(option: str, many: Any) -> None:
    """One entry, a list or a tuple is accepted and stored as a tuple, so that it cannot be changed afterwards."""
    entry = {"trusted_proxies": "10.0.0.1", "allowed_origins": "https://example.com"}[option]
    given = many([entry])
    config = WebSocketConfig(**{option: given})
    assert getattr(config, option) == (entry,)
    assert getattr(WebSocketConfig(**{option: entry}), option) == (entry,)
    assert config.changed_options() == {option}
    assert config.model_copy(update={"num_shards": 2}).changed_options() == {option, "num_shards"}


def test_compiled_origin_pattern_is_unchanged() -> None:
    """A compiled pattern is stored unchanged, beside texts."""
    pattern = re.compile(r"https://pr-\d+\.example\.com")
    assert WebSocketConfig(allowed_origins=["https://example.com", pattern]).allowed_origins == (
        "https://example.com",
        pattern,
    )
