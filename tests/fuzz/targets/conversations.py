"""Messages of a client of `stabilizer.v1.json` over several connections, and actions of its server between them.

An input consists of lines. The first character of a line is its kind:

- `R` and `S`: Ann or Bob connects again with the hello after the letter; `$TOKEN` in it is the token of the last
welcome;
- `B`: a binary frame; `M`: one of kind 1, its object and its data separated by `|`; `D`: a compressed text;
- `O` and `V`: the application sends a text, or a volatile one; `P`: the server pings; `W`: time passes;
- `H`, `F`, `I`, `X`: the next message is handled, has failed, was interrupted, is rejected; `A`: a credential is valid;
- everything else is a text frame.
"""

from __future__ import annotations

import asyncio
from collections import deque
from types import SimpleNamespace
from typing import Any, Final

from fastapi_ws_stabilizer.close_codes import CloseInfo
from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.connection.credential_expiry import CredentialExpiry
from fastapi_ws_stabilizer.connection.inbox import Inbox, InboxLimits
from fastapi_ws_stabilizer.connection.liveness import Liveness
from fastapi_ws_stabilizer.events import EventBus
from fastapi_ws_stabilizer.queueing import EnqueueResult
from fastapi_ws_stabilizer.sessions.idempotency import MAX_KEYS_PER_CLIENT, IdempotencyCache
from fastapi_ws_stabilizer.sessions.session import Session
from fastapi_ws_stabilizer.sessions.store import MAX_DETACHED_PER_CLIENT, SessionStore, StaleAttemptError
from fastapi_ws_stabilizer.sessions.v1_protocol import V1Protocol
from fastapi_ws_stabilizer.wire.deflate import deflate_stream
from fastapi_ws_stabilizer.wire.encoded import EncodedMessage, encode
from fastapi_ws_stabilizer.wire.v1.frames import Message, ProtocolError, parse
from fastapi_ws_stabilizer.wire.v1.hello import ResumeOutcome, parse_hello
from tests.fuzz import virtual
from tests.fuzz.choices import text_of
from tests.fuzz.strict_json import strict_json
from tests.support.fake_attachment import FakeAttachment

CONFIG: Final = WebSocketConfig(
    max_message_size=4096, replay_max_messages=16, replay_max_bytes=2048, max_detached_sessions=20, session_ttl=60
)

CODES: Final = {1009, 4400, 4401, 4409, 4410, 4412, 4507}
"""All close codes that a client can cause here."""

MAX_LINES: Final = 400


def conversations(data: bytes) -> None:
    """Let a client send what the lines contain."""
    virtual.run(_Stage().plays(data.split(b"\n")[:MAX_LINES]))


class _Speaker(FakeAttachment):
    """Connection without a socket, for a conversation and its session."""

    def __init__(self, stage: _Stage, now: float) -> None:
        super().__init__()
        self.config = CONFIG
        self.events = stage.events
        self.resources = SimpleNamespace(config=CONFIG, watches_input=False, listener=stage)
        self.liveness = Liveness(now)
        self.inbox = Inbox(InboxLimits(100, 10**6))
        self.credential: CredentialExpiry | None = None
        self.answers: list[EncodedMessage] = []

    def answer(self, frame: EncodedMessage) -> None:
        """Send a control frame."""
        self.answers.append(frame)

    def emit(self, event: str, level: int, **fields: Any) -> None:
        """Ignore the event."""

    def deflate_frames(self) -> None:
        """Change nothing."""

    def on_control_frame(self) -> None:
        """Count nothing."""


class _Stage:
    """The sessions of a server, and the one client that is connected at a time."""

    def __init__(self) -> None:
        self.events = EventBus()
        self.ended: dict[str, CloseInfo] = {}
        self.sessions = SessionStore(
            CONFIG,
            self.events,
            next_shard=lambda: 0,
        )
        self.sessions.listener = self
        self.seen = IdempotencyCache()
        self.speaker: _Speaker | None = None
        self.protocol: V1Protocol | None = None
        self.messages: deque[Message] = deque()
        self.tokens: dict[str, Session] = {}
        self.token = ""
        self.clients: set[str] = set()
        self.renewals = 0

    def on_session_began(self, _: Session) -> None:
        """Do nothing."""

    def on_session_ended(self, session: Session, close_info: CloseInfo) -> None:
        """Record the close info."""
        self.ended[session.connection_id] = close_info

    async def plays(self, lines: list[bytes]) -> None:
        """Execute each line, and check all invariants after it."""
        self._connects("ann", '{"type":"hello","v":1,"n":1,"caps":["deflate-raw"],"client":"c"}')
        for line in lines:
            await self._does(line[:1], line[1:], line)
            self._looks()
        self._leaves()
        await asyncio.sleep(2 * CONFIG.session_ttl)
        assert len(self.sessions) == 0, "a session outlives its ttl"
        self.sessions.stop()

    async def _does(self, sign: bytes, rest: bytes, line: bytes) -> None:
        if sign in (b"R", b"S"):
            self._leaves()
            self._connects("ann" if sign == b"R" else "bob", text_of(rest).replace("$TOKEN", self.token))
        elif sign == b"W":
            await asyncio.sleep(0.1 + len(rest))
        elif self.protocol is None or self.speaker is None:
            return
        elif sign in b"OVPA" and sign:
            self._serves(sign, rest, self.protocol, self.speaker)
        elif sign in b"HFIX" and sign:
            self._handles(sign, self.protocol, self.speaker)
        else:
            self._says(_frame_of(sign, rest, line))

    # ── the client ──

    def _connects(self, client_id: str, said: str) -> None:
        try:
            hello = parse_hello(said)
            resume_result = self.sessions.resume(hello, client_id)
        except (ProtocolError, StaleAttemptError):
            return
        self.clients.add(client_id)
        proven = self.tokens.get(hello.token or "")
        assert resume_result.session.client_id == client_id
        if resume_result.outcome in (ResumeOutcome.FULL, ResumeOutcome.GAP):
            assert resume_result.session is proven, "a session was resumed with a token of another one"
        self.sessions.on_attached(resume_result.session)
        assert resume_result.session.connection is None, "only one connection is open at a time"
        self.speaker = _Speaker(self, asyncio.get_running_loop().time())
        self.protocol = V1Protocol(resume_result, CONFIG, self.seen)
        self.protocol.on_open(self.speaker)
        frame = strict_json(self.speaker.frames[0].payload)
        self.token = frame["token"]
        self.tokens[self.token] = resume_result.session

    def on_renewal(self, _: _Speaker, credential: str | None) -> None:
        """Check and count a new credential."""
        assert credential is None or isinstance(credential, str)
        self.renewals += 1

    def _leaves(self) -> None:
        if self.protocol is None or self.speaker is None:
            return
        self.protocol.on_closing()
        while self.messages:
            self.protocol.on_failed(self.messages.popleft())
        session = self.protocol.session
        if session.detach(self.speaker):
            self.sessions.on_detached(session)
        session.previous_connection = None  # its teardown has ended
        self.protocol = self.speaker = None

    def _says(self, raw: str | bytes) -> None:
        protocol, speaker = self.protocol, self.speaker
        if protocol is None or speaker is None or speaker.close_info is not None:
            return
        before = protocol.session.accepted
        message = protocol.decode(speaker, raw)
        assert protocol.session.accepted in (before, before + 1)
        if message is not None:
            assert message.seq in (None, protocol.session.accepted)
            assert isinstance(message.raw, (str, bytes))
            self.messages.append(message)
        if speaker.close_info is not None:
            assert message is None
            assert speaker.close_info.code in CODES
            assert len(speaker.close_info.reason.encode()) <= 123

    # ── the server ──

    def _serves(self, sign: bytes, rest: bytes, protocol: V1Protocol, speaker: _Speaker) -> None:
        if sign == b"P":
            protocol.ping(speaker, None, asyncio.get_running_loop().time())
        elif sign == b"A":
            speaker.credential = speaker.credential or CredentialExpiry()
            speaker.credential.renewed(speaker, len(rest) or None)
        else:
            frame = encode(text_of(rest).encode("utf-8", "replace").decode(), volatile=sign == b"V")
            assert protocol.session.outbox.offer(frame) in EnqueueResult

    def _handles(self, sign: bytes, protocol: V1Protocol, speaker: _Speaker) -> None:
        if not self.messages:
            return
        message = self.messages.popleft()
        if sign == b"H":
            protocol.on_handled(message, message.data)
        elif sign == b"F":
            protocol.on_failed(message)
        elif sign == b"I":
            protocol.on_interrupted(message)
        else:
            protocol.reject(speaker, message, "refused", "no")

    # ── invariants ──

    def _looks(self) -> None:
        assert len(self.seen) <= MAX_KEYS_PER_CLIENT * len(self.clients)
        assert self.sessions.detached_count <= min(CONFIG.max_detached_sessions, 2 * MAX_DETACHED_PER_CLIENT)
        if self.protocol is None or self.speaker is None:
            return
        session, speaker = self.protocol.session, self.speaker
        assert session.buffer.held_bytes == sum(frame.size for frame in session.buffer.entries)
        assert len(session.buffer.entries) <= max(1, CONFIG.replay_max_messages)
        assert session.buffer.held_bytes <= CONFIG.replay_max_bytes or len(session.buffer.entries) == 1
        assert session.buffer.first_seq == session.head - len(session.buffer.entries) + 1
        for frame in (*speaker.answers, *speaker.frames):
            _is_well_formed(frame)
        speaker.answers.clear()
        speaker.frames.clear()
        if speaker.close_info is not None:
            self._leaves()


def _is_well_formed(frame: EncodedMessage) -> None:
    """Check that any client can read a frame of the server."""
    if frame.binary:
        parse(frame.payload, 2**20)
    else:
        assert strict_json(frame.payload) == parse(frame.payload.decode())


def _frame_of(sign: bytes, rest: bytes, line: bytes) -> str | bytes:
    if sign == b"B":
        return rest
    if sign == b"M":
        meta, _, payload = rest.partition(b"|")
        return b"\x01" + len(meta).to_bytes(2, "big") + meta + payload
    if sign == b"D":
        return b"\x02\x00\x00" + deflate_stream(rest)
    return text_of(line)
