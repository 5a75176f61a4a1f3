"""`WebSocketConfig`: every option, its default and its limits."""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Mapping, Sequence
from datetime import timedelta
from enum import Enum
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    SecretStr,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema
from typing_extensions import Self

from fastapi_ws_stabilizer.net.origin import OriginPolicy
from fastapi_ws_stabilizer.net.proxies import TrustedProxies
from fastapi_ws_stabilizer.platforms.options import UPPER_BOUNDED_OPTIONS, derive_options, resolve_hops
from fastapi_ws_stabilizer.platforms.platform import Platform


class HeartbeatType(str, Enum):
    """Heartbeat message for plain clients."""

    PING = "ping"
    """The text frame `{"type":"ping"}`, or a ping frame with `StableWebSocketProtocol`."""
    CUSTOM = "custom"
    """The message of `heartbeat_payload`."""
    OFF = "off"
    """Nothing. The heartbeat never closes a silent client."""


class CompressionMode(str, Enum):
    """Compression of messages on the wire."""

    DEFLATE = "deflate"
    """permessage-deflate, if the client offers it."""
    NONE = "none"
    """No compression."""


class MemoryEvictionPolicy(str, Enum):
    """Order in which connections are evicted when memory is short."""

    LRU = "lru"
    """The connection whose client has sent no message for the longest time. Answers to pings do not count. Suitable for
    chats and games, where an inactive client misses least."""
    FIFO = "fifo"
    """The connection that opened first. A reconnect counts as a new connection. Suitable for anonymous clients, which
    all get about the same time."""
    OLDEST = "oldest"
    """The connection to which the last message was delivered longest ago. Pings do not count. Suitable for tickers and
    feeds, where clients send nothing."""


class DuplicatePolicy(str, Enum):
    """Policy for a client id that connects while it is connected."""

    REPLACE = "replace"
    """The server closes the old connection with 4409, or with 4410 if it has a session."""
    REJECT = "reject"
    """The server rejects the new connection with 4409."""
    ALLOW = "allow"
    """Both connections stay open. A direct send reaches all connections of the client."""


class RejectPolicy(str, Enum):
    """How the server rejects a handshake."""

    AUTO = "auto"
    """A client that sends `Origin`, as a browser does, gets a close code. Other clients get an HTTP status. A page
    cannot read the status of a failed handshake, so it would reconnect forever with the same invalid token."""
    CLOSE = "close"
    """The server accepts the connection and closes it with a code."""
    HTTP = "http"
    """The server answers the handshake with an HTTP status."""


class InboxOverflow(str, Enum):
    """Policy for a client that sends faster than its endpoint reads."""

    PAUSE = "pause"
    """The server stops reading until your code reads. TCP slows the client down, and no message is lost. The log has
    `reading_paused` once per connection."""
    CLOSE = "close"
    """The server closes the connection with 1013."""


class OutboxOverflow(str, Enum):
    """Policy for a message to a full outbox, if the sender does not wait."""

    DISCONNECT = "disconnect"
    """The server closes the connection with 4507, so the client knows that it missed messages. For a plain client,
    `failed` counts the message, and `send_to_client` returns `False`. For a `stabilizer.v1.json` client the message
    stays in the replay buffer, so `succeeded` and `slow` count it."""
    DROP_OLDEST = "drop_oldest"
    """The server drops the messages to a plain client that have waited longest, and `dropped` counts them. For a
    `stabilizer.v1.json` client this is the same as `"disconnect"`."""
    DROP_NEWEST = "drop_newest"
    """The server drops the new message to a plain client, and `dropped` counts it. For a `stabilizer.v1.json` client
    this is the same as `"disconnect"`."""


def validate_secret(option: str, secret: SecretStr) -> SecretStr:
    """Return the secret if it is long enough.

    Raises:
        ValueError: The secret is shorter than `MIN_SECRET_BYTES`.
    """
    if len(secret.get_secret_value().encode()) < MIN_SECRET_BYTES:
        raise ValueError(
            f"{option} must be random and have at least {MIN_SECRET_BYTES} bytes: "
            'python -c "import secrets; print(secrets.token_urlsafe(32))"'
        )
    return secret


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) and not isinstance(value, Enum) else value


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


def _true_false_or_word(value: object) -> object:
    word = _lower(value)
    return (
        {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(word, word)
        if isinstance(word, str)
        else word
    )


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("the value must be a number, not True or False")
    return value


_Seconds = Annotated[float, BeforeValidator(_no_bool), Field(ge=0.001, allow_inf_nan=False)]
_PerSecond = Annotated[float, BeforeValidator(_no_bool), Field(ge=0.001, le=1e12, allow_inf_nan=False)]
_Count = Annotated[int, BeforeValidator(_no_bool), Field(gt=0)]


class _Choice:
    """Validator that reads an enum member from its value, in any case.

    The type of such an option also names the values, so that type checkers accept them. The config always holds the
    member.
    """

    def __init__(self, kind: type[Enum]) -> None:
        self._kind = kind

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Return the schema of the enum, behind the change of case."""
        return core_schema.no_info_before_validator_function(_lower, handler.generate_schema(self._kind))


MIN_SECRET_BYTES: Final = 16


class WebSocketConfig(BaseModel):
    """All options of a manager. Immutable: `config.model_copy(update=...)` returns a changed copy.

    Durations are in seconds and sizes in bytes. For a limit, `None` means no limit.

    Raises:
        pydantic.ValidationError: An option is unknown or outside its bounds. The error names the option and what is
            allowed. It is a `ValueError`.
    """

    # The text below each option is its description, for editors and for the reference of options.
    model_config: ClassVar[ConfigDict] = ConfigDict(
        use_attribute_docstrings=True, frozen=True, extra="forbid", validate_default=False
    )

    # heartbeat
    heartbeat_interval: _Seconds = 30.0
    """Seconds between two pings to the same client."""
    heartbeat_timeout: _Seconds = 60.0
    """Seconds that a client may stay silent after a ping. Then the server closes the connection with 4408."""
    heartbeat_type: Annotated[HeartbeatType | Literal["ping", "custom", "off"], _Choice(HeartbeatType)] = (
        HeartbeatType.PING
    )
    """What the heartbeat sends to a plain client."""
    heartbeat_payload: Any = None
    """Message to send with `heartbeat_type="custom"`, or a function that takes the socket and returns the message."""
    require_pong: Annotated[Literal["auto", True, False], BeforeValidator(_true_false_or_word)] = "auto"
    """Whether silence closes a connection: `True` always, `False` never, `"auto"` after the client's first pong."""

    # connections
    max_connections: _Count | None = None
    """Maximum open connections. The server answers further handshakes with HTTP 503 and `Retry-After`."""
    max_connections_per_client: _Count | None = None
    """Maximum open connections of one client id, with `on_duplicate="allow"`. The server rejects more with HTTP 429 or
    close code 4429."""
    max_connections_per_address: _Count | None = None
    """Maximum open connections from one IP address. An IPv6 /64 network counts as one address. The server rejects more
    with HTTP 429 or close code 4429."""
    max_connect_rate: _PerSecond | None = None
    """Maximum handshakes per second. The server answers further handshakes with HTTP 503 and `Retry-After`."""
    max_connect_rate_per_address: _PerSecond | None = None
    """Maximum handshakes per second from one IP address. The server rejects more with HTTP 429 or close code 4429."""
    trusted_proxies: Sequence[str] = ()
    """IP addresses and networks of proxies. The server trusts their `X-Forwarded-For` and `X-Forwarded-Host` headers.
    `"unix"` stands for a Unix socket, `"*"` for every peer."""
    reject: Annotated[RejectPolicy | Literal["auto", "close", "http"], _Choice(RejectPolicy)] = RejectPolicy.AUTO
    """How the server rejects a handshake."""
    allowed_origins: Sequence[str | re.Pattern[str]] | None = None
    """Origins that may connect, besides the server's own host. An entry is an exact origin, a wildcard host such as
    `"https://*.example.com"`, a regular expression, or `"*"` for all."""
    require_origin: bool = False
    """Whether the server rejects handshakes without an `Origin` header. Browsers always send one."""
    on_duplicate: Annotated[DuplicatePolicy | Literal["replace", "reject", "allow"], _Choice(DuplicatePolicy)] = (
        DuplicatePolicy.REPLACE
    )
    """What happens when a connected client id connects again."""
    disconnect_grace: _Seconds = 10.0
    """Seconds that an endpoint may run after its client has disconnected. Then the server cancels it. A disconnect hook
    has the same limit."""

    # messages in
    max_message_size: _Count = 1024 * 1024
    """Maximum size of one received message, in bytes. The server closes the connection with 1009 for a larger one."""
    max_message_rate: _PerSecond | None = None
    """Maximum messages per second from one client, over all its connections. More get the error reply `rate_limited`,
    and many more close the connection with 4429."""
    max_message_burst: _Count | None = None
    """Maximum messages that a client may send at once. `None` allows as many as `max_message_rate` allows per
    second."""
    max_byte_rate: _PerSecond | None = None
    """Maximum bytes per second from one client, enforced like `max_message_rate`. The server always accepts one message
    of `max_message_size` at once."""
    max_bad_messages: _Count | None = 100
    """Maximum number of error replies for messages that no handler accepts. The next such message closes the
    connection with 1008."""
    inbox_max_messages: _Count = 256
    """Maximum received messages of one connection that wait to be read."""
    inbox_max_bytes: _Count = 4 * 1024 * 1024
    """Maximum memory of the received messages of one connection that wait to be read, in bytes."""
    inbox_overflow: Annotated[InboxOverflow | Literal["pause", "close"], _Choice(InboxOverflow)] = InboxOverflow.PAUSE
    """What happens when the inbox is full."""
    inbox_pause_timeout: _Seconds = 300.0
    """Seconds that a full inbox may stay unread, with `inbox_overflow="pause"`. Then the server closes the connection
    of a hanging endpoint with 1013. For an endpoint that only sends, it drops the oldest received messages."""

    # messages out
    outbox_max_messages: _Count = 1024
    """Maximum messages that wait to be sent to one client."""
    outbox_max_bytes: _Count = 4 * 1024 * 1024
    """Maximum bytes that wait to be sent to one client. An empty outbox accepts one message of any size."""
    outbox_overflow: Annotated[
        OutboxOverflow | Literal["disconnect", "drop_oldest", "drop_newest"], _Choice(OutboxOverflow)
    ] = OutboxOverflow.DISCONNECT
    """What happens to a message when the outbox is full and the sender does not wait."""
    unsent_low_water_bytes: Annotated[int, BeforeValidator(_no_bool), Field(gt=0, lt=1 << 31)] | None = 128 * 1024
    """Unsent bytes of one client in the kernel, beyond which more bytes stay in the server: `TCP_NOTSENT_LOWAT`. `None`
    leaves it to the kernel. It has an effect on uvicorn, on Linux and macOS."""
    write_buffer_high_water_bytes: Annotated[int, BeforeValidator(_no_bool), Field(gt=0, lt=1 << 31)] = 64 * 1024
    """Unsent bytes of one client in the server's write buffer, beyond which more bytes stay in the outbox. It has an
    effect on uvicorn."""
    send_timeout: _Seconds = 10.0
    """Seconds that a send may make no progress. Then the server closes the connection with 4507."""

    # rooms
    max_rooms_per_connection: _Count | None = 100
    """Maximum rooms that one connection is in."""
    presence_grace: Annotated[float, BeforeValidator(_no_bool), Field(ge=0, allow_inf_nan=False)] = 5.0
    """Seconds that a client counts as present in its rooms after its connection was lost."""

    # reconnect
    reconnect_token_ttl: timedelta = Field(default=timedelta(hours=1), gt=timedelta(0))
    """Lifetime of a reconnect token."""
    enable_reconnect: bool = True
    """Whether sessions outlive their connections, and the server issues reconnect tokens."""
    reconnect_secret: tuple[SecretStr, ...] | None = None
    """Secret of at least 16 bytes that signs reconnect tokens, or several. The first one signs, all of them verify.
    `None` makes a random secret, so tokens are valid in this process only."""

    # identity
    ticket_ttl: _Seconds = 30.0
    """Seconds that a one-time ticket is valid."""

    # sessions
    session_ttl: _Seconds = 120.0
    """Seconds that a detached session waits for its client."""
    max_detached_sessions: _Count = 10_000
    """Maximum detached sessions. Above it the server ends the session that has been detached longest."""
    hello_timeout: _Seconds = 10.0
    """Seconds that a `stabilizer.v1.json` client has for its first frame. Each `on_auth` and `on_handshake` hook has
    the same limit."""
    replay_max_messages: _Count = 512
    """Maximum messages in the replay buffer of one session. A message stays there until its client has acknowledged
    it."""
    replay_max_bytes: _Count = 256 * 1024
    """Maximum size of the replay buffer of one session, in bytes."""
    replay_max_age: _Seconds = 120.0
    """Seconds that a message stays in a replay buffer."""
    room_history: Annotated[int, BeforeValidator(_no_bool), Field(ge=0)] = 0
    """Maximum messages that each room stores for new members."""
    room_history_max_age: _Seconds = 300.0
    """Seconds that a message stays in the history of a room."""

    # lifetime and drain
    max_lifetime: _Seconds | None = None
    """Maximum seconds that a connection stays open. The server closes it up to a tenth earlier, and the client
    reconnects."""
    idle_timeout: _Seconds | None = None
    """Seconds without a message in either direction. Then the server closes the connection, at most a quarter of that
    time later. Pings do not count."""
    drain_window: Annotated[float, BeforeValidator(_no_bool), Field(ge=0, allow_inf_nan=False)] = 10.0
    """Maximum seconds over which a drain spreads its closes."""
    drain_timeout: _Seconds = 30.0
    """Maximum seconds of a drain, and of a shutdown. Then the server aborts the connections that are left."""
    drain_secret: SecretStr | None = None
    """Secret of at least 16 bytes that a request to `POST .../drain` of the stats router must present. With `None` that
    route rejects every request."""
    handle_signals: bool = True
    """Whether SIGTERM and SIGINT start a drain before the server handles them."""

    # compression
    compression: Annotated[CompressionMode | Literal["deflate", "none"], _Choice(CompressionMode)] = (
        CompressionMode.DEFLATE
    )
    """Compression of messages, with `StableWebSocketProtocol`. Without it the server decides."""
    compression_min_bytes: Annotated[int, BeforeValidator(_no_bool), Field(ge=0)] = 512
    """Minimum size of a message that is compressed, in bytes, with `StableWebSocketProtocol`."""

    # logs and metrics
    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"], BeforeValidator(_upper)] = "INFO"
    """Level of the logger `fastapi_ws_stabilizer`."""
    enable_metrics: bool = False
    """Whether the manager times handlers and round trips, and `GET .../metrics` of the stats router answers."""

    # scale
    num_shards: Annotated[int, BeforeValidator(_no_bool), Field(gt=0, le=4096)] = 16
    """Number of shards that connections are divided into. The event loop can do other work between two shards."""
    max_concurrent_cleanup: _Count = 100
    """Maximum connections for which disconnect hooks run, and close frames wait for the server, at the same time."""
    max_concurrent_broadcast: _Count = 1000
    """Maximum sends that wait for the server at the same time. A send that waits longer than 50 ms frees its slot for
    the next one."""

    # memory
    max_memory_per_connection: _Count | None = None
    """Maximum bytes held for one connection or session. The server rejects user data above it. It closes the connection
    with 4503 when queued and unread messages exceed it."""
    max_total_memory: _Count | None = None
    """Maximum bytes held for all connections and sessions. Above it the server evicts connections with 4503."""
    memory_eviction_policy: Annotated[
        MemoryEvictionPolicy | Literal["lru", "fifo", "oldest"], _Choice(MemoryEvictionPolicy)
    ] = MemoryEvictionPolicy.LRU
    """Which connection the server evicts first when memory is short. Detached sessions go before connections."""
    memory_check_interval: _Seconds = 60.0
    """Seconds between two checks of user data that may have grown in place."""
    gc_pacing: Annotated[Literal["auto", "off"], BeforeValidator(_lower)] = "auto"
    """Whether Python's garbage collector is paced while the process has 100 or more open connections. `"auto"` does so
    unless your app has changed the collector. `"off"` never does."""

    @model_validator(mode="before")
    @classmethod
    def _options_exist(cls, values: Any) -> Any:
        for name in values if isinstance(values, dict) else ():
            if name not in cls.model_fields:
                similar = difflib.get_close_matches(str(name), cls.model_fields, n=1)
                hint = f"; did you mean {similar[0]!r}?" if similar else ""
                raise ValueError(f"WebSocketConfig has no option {name!r}{hint}")
        return values

    @field_validator("reconnect_secret", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, (str, bytes, SecretStr)) else value

    @field_validator("trusted_proxies", "allowed_origins", mode="before")
    @classmethod
    def _one_is_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, (str, re.Pattern)) else value

    @field_validator("trusted_proxies", mode="after")
    @classmethod
    def _addresses(cls, value: Sequence[str]) -> Sequence[str]:
        TrustedProxies(value)
        return tuple(value)

    @field_validator("allowed_origins", mode="after")
    @classmethod
    def _origins(cls, value: Sequence[str | re.Pattern[str]] | None) -> Sequence[str | re.Pattern[str]] | None:
        OriginPolicy(value)
        return None if value is None else tuple(value)

    @field_validator("reconnect_secret", mode="after")
    @classmethod
    def _long_enough(cls, value: tuple[SecretStr, ...] | None) -> tuple[SecretStr, ...] | None:
        for secret in value or ():
            validate_secret("reconnect_secret", secret)
        return value or None

    @field_validator("drain_secret", mode="after")
    @classmethod
    def _not_guessed(cls, value: SecretStr | None) -> SecretStr | None:
        return None if value is None else validate_secret("drain_secret", value)

    @model_validator(mode="after")
    def _burst_has_a_rate(self) -> Self:
        if self.max_message_burst is not None and self.max_message_rate is None:
            raise ValueError("max_message_burst needs max_message_rate: set both")
        return self

    @model_validator(mode="after")
    def _payload_fits_type(self) -> Self:
        custom = self.heartbeat_type is HeartbeatType.CUSTOM
        if custom and self.heartbeat_payload is None:
            raise ValueError(
                "heartbeat_type='custom' needs a heartbeat_payload: a message, or a function of the socket"
            )
        if not custom and self.heartbeat_payload is not None:
            raise ValueError("heartbeat_payload is only sent with heartbeat_type='custom'")
        return self

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with some options changed, validated like a new config.

        Raises:
            pydantic.ValidationError: A changed option is not allowed.
        """
        copy = super().model_copy(deep=deep)
        return copy if not update else type(self)(**{**dict(copy), **update})

    @classmethod
    def from_env(cls, prefix: str = "WS_", environ: Mapping[str, str] | None = None) -> Self:
        """Create a config from environment variables such as `WS_HEARTBEAT_INTERVAL`.

        Names match in any case. An empty value or `none` means `None`. `WS_RECONNECT_TOKEN_TTL` is in seconds. Other
        variables with the prefix are ignored (Kubernetes adds some), but a name close to an option logs a warning.

        Args:
            prefix: Prefix of the variables' names.
            environ: Variables to read instead of `os.environ`.

        Raises:
            pydantic.ValidationError: A value is not allowed; the error names the option.
        """
        values: dict[str, Any] = {}
        for name, text in (os.environ if environ is None else environ).items():
            if not name.lower().startswith(prefix.lower()):
                continue
            option = name[len(prefix) :].lower()
            if option in cls.model_fields:
                values[option] = _from_text(option, text)
            elif similar := difflib.get_close_matches(option, cls.model_fields, n=1, cutoff=0.8):
                logging.getLogger("fastapi_ws_stabilizer").warning(
                    "environment variable %s is not an option and is ignored; did you mean %s%s?",
                    name,
                    prefix,
                    similar[0].upper(),
                    extra={"event": "unknown_environment_option", "variable": name},
                )
        return cls(**values)

    @classmethod
    def for_platform(cls, *hops: str | Platform, **options: Any) -> Self:
        """Create a config for a path of platforms, such as `for_platform("aws-alb", "nginx", "kubernetes")`.

        The shortest idle timeout of the path decides `heartbeat_interval`, the shortest lifetime `max_lifetime`, the
        shortest grace `drain_window` and `drain_timeout`. An option for which no hop has a value keeps its default.
        `docs/deploy/platforms.md` lists the platforms and their default values.

        Args:
            hops: Names of platforms, the client's side first, or a `hop(...)` with changed values.
            options: Options that override those of the platforms.

        Raises:
            UnknownPlatformError: A hop is unknown. The error lists the names, and is a `ValueError`.
            UnsupportedPlatformError: A hop cannot hold WebSockets. The error says why, and is a `ValueError`.
            ValueError: There is no hop.
            pydantic.ValidationError: An option is not allowed.
        """
        defaults = {name: cls.model_fields[name].default for name in UPPER_BOUNDED_OPTIONS}
        return cls(**{**derive_options(resolve_hops(*hops), defaults), **options})

    def changed_options(self) -> set[str]:
        """Return the names of the options that differ from their defaults."""
        return {name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default}


def _from_text(option: str, text: str) -> Any:
    text = text.strip()
    if option == "compression":
        return text
    nothing = text.lower() in ("", "none", "null")
    if option == "trusted_proxies" and nothing:
        return ()
    if option == "allowed_origins" and text.startswith("^"):  # a regular expression, which may contain commas
        return [text]
    if nothing:
        return None
    if option in ("reconnect_secret", "trusted_proxies", "allowed_origins"):
        return [part.strip() for part in text.split(",") if part.strip()]
    if option == "reconnect_token_ttl":
        try:
            return timedelta(seconds=float(text))
        except (ValueError, OverflowError):
            return text
    return text
