"""`WebSocketConfig`: every option, its default and its limits."""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Mapping, Sequence
from datetime import timedelta
from enum import Enum
from typing import Annotated, Any, Final, Literal

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

from fastapi_ws_stabilizer.limits.address import TrustedProxies
from fastapi_ws_stabilizer.limits.origin import OriginPolicy
from fastapi_ws_stabilizer.platforms.path import UPPER_BOUNDED_OPTIONS, derive_options, resolve_hops
from fastapi_ws_stabilizer.platforms.platform import Platform


class HeartbeatType(str, Enum):
    """What a heartbeat sends to a plain client."""

    PING = "ping"
    """The text frame `{"type":"ping"}`."""
    CUSTOM = "custom"
    """The `heartbeat_payload`."""
    OFF = "off"
    """Nothing; a silent client is never closed by the heartbeat."""


class CompressionMode(str, Enum):
    """Compression of messages on the wire."""

    DEFLATE = "deflate"
    NONE = "none"


class MemoryEvictionPolicy(str, Enum):
    """Which connection goes first when memory is short."""

    LRU = "lru"
    FIFO = "fifo"
    OLDEST = "oldest"


class DuplicatePolicy(str, Enum):
    """What happens when a client id connects that is connected already."""

    REPLACE = "replace"
    """The new connection stays, the old one is closed with 4409."""
    REJECT = "reject"
    """The old connection stays, the new one is closed with 4409."""
    ALLOW = "allow"
    """Both stay; a direct send reaches all connections of the client."""


class RejectPolicy(str, Enum):
    """How a client is told that it may not come in."""

    AUTO = "auto"
    """A browser, which can read neither status nor body of a failed handshake, by a close code; others by HTTP."""
    CLOSE = "close"
    """By accepting, and closing with a code."""
    HTTP = "http"
    """By the status of the handshake."""


class InboxOverflow(str, Enum):
    """What happens when a client sends faster than its endpoint reads."""

    PAUSE = "pause"
    """Reading stops until there is room: TCP pushes back, nothing is lost."""
    CLOSE = "close"
    """The connection is closed with 1013."""


class OutboxOverflow(str, Enum):
    """What happens to a message for a client whose outbox is full, if its sender does not wait."""

    DISCONNECT = "disconnect"
    """The client is disconnected with 4507: it can come back, and knows that it has missed something."""
    DROP_OLDEST = "drop_oldest"
    """The messages that have waited longest are thrown away."""
    DROP_NEWEST = "drop_newest"
    """The message is left out."""


def validate_secret(option: str, secret: SecretStr) -> SecretStr:
    """Return a secret that nobody guesses.

    Raises:
        ValueError: It is too short.
    """
    if len(secret.get_secret_value().encode()) < MIN_SECRET_BYTES:
        raise ValueError(
            f"a {option} has at least {MIN_SECRET_BYTES} bytes, and is random: "
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
        raise ValueError("a number is wanted, not True or False")
    return value


_Seconds = Annotated[float, BeforeValidator(_no_bool), Field(ge=0.001, allow_inf_nan=False)]
_PerSecond = Annotated[float, BeforeValidator(_no_bool), Field(ge=0.001, le=1e12, allow_inf_nan=False)]
_Count = Annotated[int, BeforeValidator(_no_bool), Field(gt=0)]


class _Choice:
    """Makes one of an enumeration's members of its value, however it is spelt.

    The type of such an option names the values too, so that type checkers let them be given; what the config holds is
    always the member.
    """

    def __init__(self, kind: type[Enum]) -> None:
        self._kind = kind

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Read the member alone."""
        return core_schema.no_info_before_validator_function(_lower, handler.generate_schema(self._kind))


MIN_SECRET_BYTES: Final = 16


class WebSocketConfig(BaseModel):
    """All options of a manager. Frozen: make a changed copy with `config.model_copy(update=...)`.

    Seconds are floats, sizes are bytes, `None` means no limit.

    Raises:
        pydantic.ValidationError: An option is unknown or outside its limits; the error names it and what is allowed.
            It is a `ValueError`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=False)

    # heartbeat
    heartbeat_interval: _Seconds = Field(default=30.0, description="Seconds between two pings to one client.")
    heartbeat_timeout: _Seconds = Field(
        default=60.0, description="Seconds that a client may stay silent after a ping before it is closed with 4408."
    )
    heartbeat_type: Annotated[HeartbeatType | Literal["ping", "custom", "off"], _Choice(HeartbeatType)] = Field(
        default=HeartbeatType.PING, description="What a heartbeat sends: the ping, `heartbeat_payload`, or nothing."
    )
    heartbeat_payload: Any = Field(
        default=None,
        description="With heartbeat_type='custom': what to send, or a function of the socket that returns it.",
    )
    require_pong: Annotated[Literal["auto", True, False], BeforeValidator(_true_false_or_word)] = Field(
        default="auto",
        description="Whether silence closes a connection: always, never, or ('auto') from the client's first pong on.",
    )

    # connections
    max_connections: _Count | None = Field(default=None, description="Most connections at one time.")
    max_connections_per_client: _Count | None = Field(
        default=None, description="Most connections of one client id at one time, with on_duplicate='allow'."
    )
    max_connections_per_address: _Count | None = Field(
        default=None, description="Most connections from one address at one time; an IPv6 network of 64 bits is one."
    )
    max_connect_rate: _PerSecond | None = Field(
        default=None, description="Most handshakes in a second; more are answered with 503."
    )
    max_connect_rate_per_address: _PerSecond | None = Field(
        default=None, description="Most handshakes in a second from one address; more are answered with 429."
    )
    trusted_proxies: Sequence[str] = Field(
        default=(),
        description="Addresses and networks of proxies whose `X-Forwarded-For` and `X-Forwarded-Host` are believed.",
    )
    reject: Annotated[RejectPolicy | Literal["auto", "close", "http"], _Choice(RejectPolicy)] = Field(
        default=RejectPolicy.AUTO, description="How a client is told that it may not come in."
    )
    allowed_origins: Sequence[str | re.Pattern[str]] | None = Field(
        default=None,
        description="Origins of pages that may connect, beside those of our own host: exact, with a wildcard host, "
        "or as a regular expression.",
    )
    require_origin: bool = Field(
        default=False, description="Whether handshakes without an `Origin`, which no browser sends, are refused."
    )
    on_duplicate: Annotated[DuplicatePolicy | Literal["replace", "reject", "allow"], _Choice(DuplicatePolicy)] = Field(
        default=DuplicatePolicy.REPLACE, description="What happens when a connected client id connects again."
    )
    disconnect_grace: _Seconds = Field(
        default=10.0,
        description="Seconds that an endpoint has to finish after its client has left, before it is cancelled; "
        "a disconnect hook has as long.",
    )

    # messages in
    max_message_size: _Count = Field(
        default=1024 * 1024, description="Most bytes of one received message; more closes 1009."
    )
    max_message_rate: _PerSecond | None = Field(
        default=None,
        description="Most messages in a second from one client, over all its connections; more get an error reply, "
        "and many more close 4429.",
    )
    max_message_burst: _Count | None = Field(
        default=None, description="Messages that may come at once; as many as in a second when left out."
    )
    max_byte_rate: _PerSecond | None = Field(
        default=None, description="Most bytes in a second from one client; as with `max_message_rate`."
    )
    max_bad_messages: _Count | None = Field(
        default=100,
        description="How many messages that no handler could take get an error reply; the next one closes 1008.",
    )
    inbox_max_messages: _Count = Field(default=256, description="Most received messages that wait to be read.")
    inbox_max_bytes: _Count = Field(default=4 * 1024 * 1024, description="Most bytes of received messages that wait.")
    inbox_overflow: Annotated[InboxOverflow | Literal["pause", "close"], _Choice(InboxOverflow)] = Field(
        default=InboxOverflow.PAUSE, description="What happens when the inbox is full."
    )

    inbox_pause_timeout: _Seconds = Field(
        default=300.0,
        description="Seconds that a full inbox may go unread before a hanging endpoint is closed with 1013.",
    )

    # messages out
    outbox_max_messages: _Count = Field(default=1024, description="Most messages that wait to be sent to one client.")
    outbox_max_bytes: _Count = Field(
        default=4 * 1024 * 1024, description="Most bytes that wait; one message of any size fits into an empty outbox."
    )
    outbox_overflow: Annotated[
        OutboxOverflow | Literal["disconnect", "drop_oldest", "drop_newest"], _Choice(OutboxOverflow)
    ] = Field(
        default=OutboxOverflow.DISCONNECT,
        description="What happens when an outbox is full: the client is disconnected (4507), or messages are dropped.",
    )
    send_timeout: _Seconds = Field(
        default=10.0, description="Seconds after which a send that makes no progress ends the connection (4507)."
    )

    # rooms
    max_rooms_per_connection: _Count | None = Field(default=100, description="Most rooms that one connection is in.")
    presence_grace: Annotated[float, BeforeValidator(_no_bool), Field(ge=0, allow_inf_nan=False)] = Field(
        default=5.0,
        description="Seconds that a client whose connection broke still counts as present in its rooms.",
    )

    # reconnect
    reconnect_token_ttl: timedelta = Field(default=timedelta(hours=1), gt=timedelta(0), description="Life of a token.")
    enable_reconnect: bool = Field(
        default=True, description="Whether sessions outlive their connections, and tokens are issued."
    )
    reconnect_secret: tuple[SecretStr, ...] | None = Field(
        default=None, description="What tokens are signed with: one secret, or several, the first of which signs."
    )

    # identity
    ticket_ttl: _Seconds = Field(default=30.0, description="Seconds that a one-time ticket is good for.")

    # sessions
    session_ttl: _Seconds = Field(
        default=120.0, description="Seconds that a session waits for its client after a disconnect."
    )
    max_detached_sessions: _Count = Field(default=10_000, description="Most sessions that wait for their clients.")
    hello_timeout: _Seconds = Field(
        default=10.0,
        description="Seconds that a client of `stabilizer.v1.json` has for its first frame, and each `on_auth` and "
        "`on_handshake` hook.",
    )
    replay_max_messages: _Count = Field(default=512, description="Most unacknowledged messages kept for one session.")
    replay_max_bytes: _Count = Field(default=256 * 1024, description="Most bytes of them.")
    replay_max_age: _Seconds = Field(default=120.0, description="Seconds that one of them is kept.")
    room_history: Annotated[int, BeforeValidator(_no_bool), Field(ge=0)] = Field(
        default=0, description="Messages that each room remembers for newcomers."
    )
    room_history_max_age: _Seconds = Field(default=300.0, description="Seconds that a room remembers one of them.")

    # going away
    max_lifetime: _Seconds | None = Field(
        default=None,
        description="Seconds after which a connection is closed at the latest, up to a tenth earlier; it comes back.",
    )
    idle_timeout: _Seconds | None = Field(
        default=None,
        description="Seconds without a message, either way, after which a connection is closed, a quarter later "
        "at the latest. Pings do not count.",
    )
    drain_window: Annotated[float, BeforeValidator(_no_bool), Field(ge=0, allow_inf_nan=False)] = Field(
        default=10.0, description="Seconds that the closes of a drain are spread over at most."
    )
    drain_timeout: _Seconds = Field(
        default=30.0, description="Seconds that all of a drain may take, and a shutdown; what is not over then is cut."
    )
    drain_secret: SecretStr | None = Field(
        default=None, description="What has to be presented to `POST .../drain` of the stats router."
    )
    handle_signals: bool = Field(default=True, description="Whether SIGTERM and SIGINT start a drain.")

    # compression
    compression: Annotated[CompressionMode | Literal["deflate", "none"], _Choice(CompressionMode)] = Field(
        default=CompressionMode.DEFLATE,
        description="Compression of messages on the wire, where the client offers it and the server can be told.",
    )
    compression_min_bytes: Annotated[int, BeforeValidator(_no_bool), Field(ge=0)] = Field(
        default=512, description="Messages below this size are not compressed (with `StableWebSocketProtocol`)."
    )

    # logs and metrics
    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"], BeforeValidator(_upper)] = Field(
        default="INFO", description="Level of the logger `fastapi_ws_stabilizer`."
    )
    enable_metrics: bool = Field(
        default=False, description="Whether handlers and round trips are timed, and `GET .../metrics` answers."
    )

    # scale
    num_shards: Annotated[int, BeforeValidator(_no_bool), Field(gt=0, le=4096)] = Field(
        default=16,
        description="Parts that connections are divided into; between two of them the event loop can do other work.",
    )
    max_concurrent_cleanup: _Count = Field(
        default=100,
        description="Most connections whose disconnect hooks run, and whose close frames wait for the server, "
        "at the same time.",
    )
    max_concurrent_broadcast: _Count = Field(
        default=1000, description="Most sends that the server makes wait at the same time."
    )

    # memory
    max_memory_per_connection: _Count | None = Field(default=None, description="Most bytes held for one connection.")
    max_total_memory: _Count | None = Field(default=None, description="Most bytes held for all connections.")
    memory_eviction_policy: Annotated[
        MemoryEvictionPolicy | Literal["lru", "fifo", "oldest"], _Choice(MemoryEvictionPolicy)
    ] = Field(default=MemoryEvictionPolicy.LRU, description="Which connection goes first.")
    memory_check_interval: _Seconds = Field(default=60.0, description="Seconds between two checks.")

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
            raise ValueError("max_message_burst is how many of max_message_rate may come at once: set that too")
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
        """A copy with some options changed, validated as a new one is.

        Raises:
            pydantic.ValidationError: A changed option is not allowed.
        """
        copy = super().model_copy(deep=deep)
        return copy if not update else type(self)(**{**dict(copy), **update})

    @classmethod
    def from_env(cls, prefix: str = "WS_", environ: Mapping[str, str] | None = None) -> Self:
        """Read options from environment variables such as `WS_HEARTBEAT_INTERVAL`, as a ConfigMap provides them.

        Names are matched whatever their case. An empty value or `none` stands for `None`; a token's life is given in
        seconds. Variables with the prefix that are no option are left alone (Kubernetes adds some of its own), and one
        that looks like a misspelt option is warned about.

        Args:
            prefix: What the variables' names begin with.
            environ: Where to read instead of `os.environ`.

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
                    "environment variable %s is no option and is ignored; did you mean %s%s?",
                    name,
                    prefix,
                    similar[0].upper(),
                    extra={"event": "unknown_environment_option", "variable": name},
                )
        return cls(**values)

    @classmethod
    def for_platform(cls, *hops: str | Platform, **options: Any) -> Self:
        """The options that fit a path such as `for_platform("aws-alb", "nginx", "kubernetes")`, with changes of yours.

        The smallest idle timeout of the path decides `heartbeat_interval`, the smallest lifetime `max_lifetime`, the
        smallest grace `drain_window` and `drain_timeout`; an option for which no hop has a value keeps its default. The
        platforms' values are those that hold unless somebody has changed them: `docs/deploy/platforms.md` lists them.

        Args:
            hops: Names of platforms, the client's side first, or what `hop` makes of one that was changed.
            options: Options that are set whatever the platforms say.

        Raises:
            UnknownPlatformError: Nothing is known of a hop. It is a `ValueError`, and lists the names.
            UnsupportedPlatformError: A hop cannot hold sockets; it says why. It is a `ValueError`.
            ValueError: There is no hop.
            pydantic.ValidationError: An option is not allowed.
        """
        defaults = {name: cls.model_fields[name].default for name in UPPER_BOUNDED_OPTIONS}
        return cls(**{**derive_options(resolve_hops(*hops), defaults), **options})

    def changed_options(self) -> set[str]:
        """Names of the options that differ from their default."""
        return {name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default}


def _from_text(option: str, text: str) -> Any:
    text = text.strip()
    if option == "compression":
        return text
    nothing = text.lower() in ("", "none", "null")
    if option == "trusted_proxies" and nothing:
        return ()
    if option == "allowed_origins" and text.startswith("^"):  # a regular expression, which may have commas in it
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
