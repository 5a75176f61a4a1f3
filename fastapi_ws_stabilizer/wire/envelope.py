"""Conversion of encoded messages to `stabilizer.v1.json` frames, shared by all clients."""

from __future__ import annotations

from typing import Any, Final

from pydantic_core import to_json

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.errors import MessageEncodeError
from fastapi_ws_stabilizer.wire.encoded import EncodedMessage
from fastapi_ws_stabilizer.wire.identifiers import NAME_RULE, is_name
from fastapi_ws_stabilizer.wire.strict_json import MAX_FRAME_DEPTH, check_sent
from fastapi_ws_stabilizer.wire.v1.frames import MAX_SENT_BYTES, binary_envelope, deflated, envelope

ALWAYS_FITS: Final = MAX_SENT_BYTES // 8
"""Messages up to this many bytes always fit in a frame. A JSON string takes at most six times the bytes of its text."""


def to_v1(frame: EncodedMessage) -> EncodedMessage:
    """Return the `msg` frame of a message. It is created once for all clients.

    Raises:
        MessageEncodeError: The frame is larger than clients of `stabilizer.v1.json` accept.
    """
    if frame.is_envelope:
        return frame
    if frame.enveloped is None:
        enveloped = _cached(_made(frame), volatile=frame.volatile)
        if frame.key is not None:
            # A volatile frame has no number, so it and a numbered one cannot replace each other.
            enveloped.key = (frame.volatile, frame.key)
            enveloped.takes_slow_path = True
        frame.enveloped = enveloped
    return frame.enveloped


def to_deflated(frame: EncodedMessage) -> EncodedMessage:
    """Return the v1 frame for clients that accept compressed frames.

    It is created once for all of them. If compression does not make it smaller, this is the uncompressed frame.
    """
    if frame.deflated is None:
        packed = None if frame.text is None else deflated(frame.text)
        frame.deflated = False if packed is None else EncodedMessage(packed, binary=True)
    return frame.deflated or frame


def copy_for_replay(frame: EncodedMessage) -> EncodedMessage:
    """Return a copy of a message that was sent before, for one more client."""
    copy = EncodedMessage(frame.payload, binary=frame.binary, size=frame.size)
    copy.is_json, copy.room = frame.is_json, frame.room
    return copy


def sequenced_frame(type_: str, data: Any, **fields: Any) -> EncodedMessage:
    """Return a `msg` or `reply` frame for a single client.

    Raises:
        MessageEncodeError: The data cannot be encoded as JSON that the client can read, the event is not a valid name,
            or the frame is too large.
    """
    event = fields.get("event")
    if event is not None and not (isinstance(event, str) and is_name(event)):
        raise MessageEncodeError(f"an event must be a string of {NAME_RULE}")
    try:
        payload = envelope(type_, data, **fields)
        if isinstance(payload, bytes):
            return _cached(_small(EncodedMessage(payload, binary=True)), volatile=False)
        encoded = payload.encode("utf-8")
        check_sent(encoded, MAX_FRAME_DEPTH)
    except ValueError as error:
        raise MessageEncodeError(f"a {type(data).__name__} cannot be sent as JSON: {error}") from error
    return _cached(_small(EncodedMessage(encoded)), volatile=False)


def _made(frame: EncodedMessage) -> EncodedMessage:
    head: dict[str, Any] = {"type": "msg"}
    if frame.volatile:
        head["volatile"] = True
    if frame.room is not None:
        head["room"] = frame.room
    if frame.binary:
        return _small(EncodedMessage(binary_envelope(head, frame.payload), binary=True))
    data = frame.payload if frame.is_json else to_json(frame.text)
    return _small(EncodedMessage(to_json(head)[:-1] + b',"data":' + data + b"}"))


def _small(frame: EncodedMessage) -> EncodedMessage:
    if frame.size > MAX_SENT_BYTES:
        raise MessageEncodeError(
            f"the message has {frame.size} bytes, but clients accept {MAX_SENT_BYTES}: send it in parts"
        )
    return frame


def _cached(frame: EncodedMessage, *, volatile: bool) -> EncodedMessage:
    frame.volatile = frame.takes_slow_path = volatile
    frame.created_at = monotonic()
    frame.is_envelope = True
    return frame
