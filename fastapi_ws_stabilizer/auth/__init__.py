"""Authentication: credential sources, reconnect tokens and one-time tickets."""

from fastapi_ws_stabilizer.auth.credentials import Credential, bearer, cookie, first_message, query, subprotocol

__all__ = ["Credential", "bearer", "cookie", "first_message", "query", "subprotocol"]
