"""What a handshake says of its client: client id, reconnect token, and the expiry of the identity."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import datetime
from typing import Any, Final
from uuid import UUID, uuid4

from fastapi import HTTPException, WebSocket

from fastapi_ws_stabilizer.auth.signed_tokens import looks_like_token
from fastapi_ws_stabilizer.clock import wall
from fastapi_ws_stabilizer.wire.identifiers import NAME_RULE, is_name

Moment = datetime | float | None
"""Expiry of an identity: a `datetime` with a time zone, seconds since 1970, or `None` for no expiry."""

MAX_TERM: Final = 10 * 365 * 86_400.0
"""Longest term of an identity in seconds. A longer term counts as no expiry, because no timer waits that long."""

TOKEN_PARAMETERS: Final = ("reconnect_token", "token")
"""Query parameters that may contain a reconnect token.

A login may use `token` too, so a value without the prefix of a reconnect token is ignored.
"""


def client_id_from_request(websocket: WebSocket) -> str | None:
    """Return the path parameter `client_id`, else the query parameter, else `None`.

    Raises:
        HTTPException: 400 if the id is too long or contains a control character.
    """
    given = websocket.path_params.get("client_id")
    if given is None and websocket.scope["query_string"]:
        given = websocket.query_params.get("client_id")
    if given in (None, ""):
        return None
    client_id = str(given)
    if not is_name(client_id):
        raise HTTPException(400, f"client_id: {NAME_RULE}")
    return client_id


def reconnect_token_from_request(websocket: WebSocket) -> str | None:
    """Return the reconnect token in the query, or `None`."""
    if not websocket.scope["query_string"]:
        return None
    found = (websocket.query_params.get(name) for name in TOKEN_PARAMETERS)
    return next((token for token in found if token is not None and looks_like_token(token)), None)


def fresh_client_id() -> str:
    """Return a random id for an anonymous client."""
    return uuid4().hex


def client_id_from_identity(identity: Any, key: Callable[[Any], object] | None) -> str:
    """Return the client id for the result of an identity dependency.

    Raises:
        TypeError: The result, or what `key` returned for it, is not a `str`, `int` or `UUID`, or is empty. The error
            says what to write.
        HTTPException: 401 if the client id is too long or contains a control character.
    """
    chosen = identity if key is None else key(identity)
    if isinstance(chosen, (str, int, UUID)) and not isinstance(chosen, bool) and str(chosen):
        client_id = str(chosen)
        if not is_name(client_id):
            raise HTTPException(401, f"invalid client id in the credential: {NAME_RULE}")
        return client_id
    if key is None:
        raise TypeError(
            f"a {type(identity).__name__} is not a client id: select the id with a key, "
            "manager.socket_for(identify, key=lambda identity: identity.id)"
        )
    raise TypeError(
        f"the key of manager.socket_for returned {chosen!r}, but a client id is a str, int or UUID that is not empty"
    )


def seconds_until_expiry(moment: Moment) -> float | None:
    """Return the seconds until an identity expires, or `None` if it does not expire.

    Args:
        moment: The expiry: a `datetime` with a time zone, or seconds since 1970 as in the `exp` of a JWT.

    Raises:
        TypeError: The expiry has another type, or no time zone. The error says what to return.
        HTTPException: 401 if the identity has expired.
    """
    if moment is None:
        return None
    if isinstance(moment, datetime) and moment.tzinfo is not None:
        left = moment.timestamp() - wall()
    elif isinstance(moment, (int, float)) and not isinstance(moment, bool) and not math.isnan(moment):
        left = moment - wall()
    else:
        raise TypeError(
            f"expires_at of manager.socket_for returned {moment!r}: return a datetime with a time zone, seconds since "
            "1970, or None"
        )
    if left <= 0:
        raise HTTPException(401, "the credential has expired")
    return left if left < MAX_TERM else None
