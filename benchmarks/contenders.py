"""The contenders: our library in two configurations, a bare endpoint, the reference, and the peers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

SANSIO = "websockets-sansio"
PROTOCOL_CLASS = "fastapi_ws_stabilizer.servers.uvicorn:StableWebSocketProtocol"


@dataclass(frozen=True)
class Contender:
    """One server, and how a client connects to it.

    Attributes:
        name: Name in `--contenders` and in the bars.
        title: Name in the tables.
        app: Its module in `benchmarks.apps`.
        peer: Whether it runs in the environment of the peers.
        path: Path of its WebSocket; `{n}` is another number for each client.
        hello: What a client has to send before it is served.
        subprotocol: What a client offers. A client that offers one sends its `hello` first.
        ws: Value of uvicorn's `--ws`.
        options: Its config, where it has one.
        variant: Distinguishes rows of the same contender with other options.
    """

    name: str
    title: str
    app: str
    peer: bool = False
    path: str = "/ws/{n}"
    hello: str | None = None
    subprotocol: str | None = None
    ws: str = SANSIO
    options: dict[str, Any] = field(default_factory=dict)
    variant: str = ""

    @property
    def key(self) -> str:
        """Key of its row."""
        return f"{self.name} {self.variant}".strip()

    def using(self, variant: str = "", **options: Any) -> Contender:
        """Return the same contender with other options."""
        title = f"{self.title}, {variant}" if variant else self.title
        return replace(self, options={**self.options, **options}, variant=variant, title=title)


PLAIN = Contender("ours-plain", "this library, plain uvicorn", "ours")
PROTOCOL = Contender("ours-protocol", "this library, protocol class", "ours", ws=PROTOCOL_CLASS)
_V1 = {"subprotocol": "stabilizer.v1.json", "hello": '{"type":"hello","v":1,"n":1}'}
PLAIN_V1 = replace(PLAIN, name="ours-plain-v1", title=f"{PLAIN.title}, v1 clients", **_V1)
PROTOCOL_V1 = replace(PROTOCOL, name="ours-protocol-v1", title=f"{PROTOCOL.title}, v1 clients", **_V1)
BARE = Contender("bare", "bare FastAPI endpoint", "bare")
BARE_DEPENDENCY = Contender("bare-dependency", "bare endpoint with a `yield` dependency", "bare_dependency")
REFERENCE = Contender("reference", "fastapi-websocket-stabilizer (the reference)", "reference", peer=True)
SOCKETIO = Contender(
    "socketio", "python-socketio", "socketio", peer=True, path="/socket.io/?EIO=4&transport=websocket&n={n}", hello="40"
)
LITESTAR = Contender("litestar", "litestar channels", "litestar", peer=True, path="/all?n={n}")
CHANX = Contender("chanx", "chanx", "chanx", peer=True)
FAST_CHANNELS = Contender("fast-channels", "fast-channels", "fast_channels", peer=True)
CHANNEL_BOX = Contender("channel-box", "channel-box", "channel_box", peer=True)
WEBSOCKETS = Contender("websockets", "websockets.broadcast", "websockets", peer=True)
PICOWS = Contender("picows", "picows", "picows", peer=True)
RAW = Contender("raw", "raw transport (the limit)", "raw", peer=True)

ALL = (
    PLAIN,
    PROTOCOL,
    PLAIN_V1,
    PROTOCOL_V1,
    BARE,
    BARE_DEPENDENCY,
    REFERENCE,
    SOCKETIO,
    LITESTAR,
    CHANX,
    FAST_CHANNELS,
    CHANNEL_BOX,
    WEBSOCKETS,
    PICOWS,
    RAW,
)
"""All contenders, in the order of the tables."""
