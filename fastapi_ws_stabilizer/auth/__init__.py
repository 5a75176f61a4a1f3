"""Who a client is: where its credential is found, and tickets to come in with."""

from fastapi_ws_stabilizer.auth.credentials import Credential, bearer, cookie, first_message, query, subprotocol

__all__ = ["Credential", "bearer", "cookie", "first_message", "query", "subprotocol"]
