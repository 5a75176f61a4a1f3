"""Documented limits of platforms between client and server, and the options that fit them."""

from fastapi_ws_stabilizer.platforms.options import hop

__all__ = ["hop"]
