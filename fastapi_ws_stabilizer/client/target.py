"""Server that a client connects to."""

from __future__ import annotations

import inspect
import re
from collections.abc import Awaitable, Callable
from typing import Any, Final

from fastapi_ws_stabilizer.client.transport import Connect, Transport
from fastapi_ws_stabilizer.wire.v1.frames import SUBPROTOCOL

Provider = Callable[[], "str | Awaitable[str]"]

_SECRET: Final = re.compile(r"(?<=://)[^/?#]*@|[?#].*", re.DOTALL)
"""The credentials and the query of a URL."""


class Target:
    """Server of a client: its URL, the credential for it, and the function that opens a WebSocket to it.

    Args:
        url: The URL, or a function that returns it.
        auth: Function that returns the credential for the first frame.
        dial: Function that opens a WebSocket.

    Raises:
        TypeError: `url` is neither a string nor a function, or `auth` is no function.
    """

    def __init__(self, url: str | Provider, auth: Callable[..., Any] | None, dial: Connect) -> None:
        if not (isinstance(url, str) or callable(url)):
            raise TypeError(
                f"url must be a string such as 'wss://example.com/ws', or a function that returns one, not {url!r}"
            )
        if auth is not None and not callable(auth):  # the text does not contain the value, which may be a credential
            raise TypeError(f"auth must be a function that returns the credential, not a {type(auth).__name__}")
        self._url = url
        self._auth = auth
        self._dial = dial

    def __str__(self) -> str:
        """Return the URL for logs, without credentials and query."""
        return _SECRET.sub("", self._url) if isinstance(self._url, str) else "the server"

    @property
    def can_reauthenticate(self) -> bool:
        """Whether a rejected credential can be replaced by a new one."""
        return self._auth is not None

    async def credential(self, *, force: bool) -> str | None:
        """Return the credential; `None` without an `auth` function. Whatever that function raises propagates.

        Args:
            force: Whether the server has rejected the last credential or asks for a new one.
        """
        if self._auth is None:
            return None
        value = self._auth(force=force) if _takes_force(self._auth) else self._auth()
        value = await value if inspect.isawaitable(value) else value
        return None if value is None else str(value)

    async def dial(self) -> Transport:
        """Open a WebSocket. Cancelling is safe. Whatever the function for the URL raises propagates.

        Raises:
            TransportClosedError: The attempt has failed.
            ClientClosedError: No attempt can succeed.
        """
        url = self._url if isinstance(self._url, str) else self._url()
        return await self._dial(await url if inspect.isawaitable(url) else url, [SUBPROTOCOL])


def _takes_force(function: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(one.name == "force" or one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters)
