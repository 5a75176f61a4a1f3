"""A message that was encoded for everybody, as a client of `stabilizer.v1.json` gets it: the same bytes for each."""

from __future__ import annotations

from typing import Any

from pydantic_core import to_json

from fastapi_ws_stabilizer.clock import monotonic
from fastapi_ws_stabilizer.wire.payload import Frame
from fastapi_ws_stabilizer.wire.v1 import binary_envelope, deflated, envelope


def envelop(frame: Frame) -> Frame:
    """The `msg` frame for a message, made once for all clients."""
    if frame.is_envelope:
        return frame
    if frame.enveloped is None:
        frame.enveloped = _as_kept(_made(frame), volatile=frame.volatile)
        if frame.volatile:  # what is numbered cannot be left out for a newer one
            frame.enveloped.key = frame.key
    return frame.enveloped


def deflate_frame(frame: Frame) -> Frame:
    """A frame of the v1 protocol as it goes to clients that take compressed ones: made once for all of them."""
    if frame.deflated is None:
        packed = None if frame.text is None else deflated(frame.text)
        frame.deflated = False if packed is None else Frame(packed, binary=True)
    return frame.deflated or frame


def again(frame: Frame) -> Frame:
    """A message that was sent before, to be sent to one more client."""
    copy = Frame(frame.payload, binary=frame.binary, size=frame.size)
    copy.is_json, copy.room = frame.is_json, frame.room
    return copy


def sequenced(type_: str, data: Any, **fields: Any) -> Frame:
    """A `msg` or a `reply` for one client alone.

    Raises:
        ValueError: The data cannot be JSON.
    """
    payload = envelope(type_, data, **fields)
    if isinstance(payload, bytes):
        return _as_kept(Frame(payload, binary=True), volatile=False)
    return _as_kept(Frame(payload.encode("utf-8")), volatile=False)


def _made(frame: Frame) -> Frame:
    head: dict[str, Any] = {"type": "msg"}
    if frame.volatile:
        head["volatile"] = True
    if frame.room is not None:
        head["room"] = frame.room
    if frame.binary:
        return Frame(binary_envelope(head, frame.payload), binary=True)
    data = frame.payload if frame.is_json else to_json(frame.text)
    return Frame(to_json(head)[:-1] + b',"data":' + data + b"}")


def _as_kept(frame: Frame, *, volatile: bool) -> Frame:
    frame.volatile = volatile
    frame.at = monotonic()
    frame.is_envelope = True
    return frame
