"""Who a connection belongs to."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import datetime
from typing import Any, Final
from uuid import UUID, uuid4

from fastapi import HTTPException, WebSocket

from fastapi_ws_stabilizer.clock import wall
from fastapi_ws_stabilizer.wire.identifiers import NAME_RULE, is_name

Moment = datetime | float | None
"""Until when an identity is good: a moment with its time zone, seconds since 1970, or `None` for ever."""

MAX_TERM: Final = 10 * 365 * 86_400.0
"""Seconds. What is good for longer is good for ever: no timer waits that long."""


def client_id_from_request(websocket: WebSocket) -> str | None:
    """The path parameter `client_id`, else the query parameter; `None` if there is neither.

    Raises:
        HTTPException: 400: it is longer than a name may be, or has a control character.
    """
    given = websocket.path_params.get("client_id")
    if given is None:
        given = websocket.query_params.get("client_id")
    if given in (None, ""):
        return None
    client_id = str(given)
    if not is_name(client_id):
        raise HTTPException(400, f"client_id: {NAME_RULE}")
    return client_id


def fresh_client_id() -> str:
    """An id for a client that has not said who it is."""
    return uuid4().hex


def client_id_from(identity: Any, key: Callable[[Any], object] | None) -> str:
    """The client id that stands for what an identity dependency returned.

    Raises:
        TypeError: There is no telling; the error says how to.
        HTTPException: 401: the credential names a client that cannot be called so.
    """
    chosen = identity if key is None else key(identity)
    if isinstance(chosen, (str, int, UUID)) and not isinstance(chosen, bool) and str(chosen):
        client_id = str(chosen)
        if not is_name(client_id):
            raise HTTPException(401, f"the client id of this credential: {NAME_RULE}")
        return client_id
    if key is None:
        raise TypeError(
            f"a {type(identity).__name__} is no client id: say which part of it is one, "
            "manager.socket_for(identify, key=lambda identity: identity.id)"
        )
    raise TypeError(
        f"the key of manager.socket_for gave {chosen!r}, and a client id is a str, int or UUID that says something"
    )


def seconds_until_expiry(moment: Moment) -> float | None:
    """For how many seconds an identity is good; `None` if for ever.

    Args:
        moment: Until when: a moment with its time zone, or seconds since 1970, as a JWT's `exp` is.

    Raises:
        TypeError: It is neither, or has no time zone. The error says what is wanted.
        HTTPException: 401: that was before now.
    """
    if moment is None:
        return None
    if isinstance(moment, datetime) and moment.tzinfo is not None:
        left = moment.timestamp() - wall()
    elif isinstance(moment, (int, float)) and not isinstance(moment, bool) and not math.isnan(moment):
        left = moment - wall()
    else:
        raise TypeError(
            f"expires_at of manager.socket_for gave {moment!r}: it is a datetime with a time zone, seconds since 1970, "
            "or None"
        )
    if left <= 0:
        raise HTTPException(401, "the credential has expired")
    return left if left < MAX_TERM else None
