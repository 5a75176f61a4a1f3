"""What stands between a client and the server: facts about platforms, and what follows from them for the options."""

from fastapi_ws_stabilizer.platforms.options import hop

__all__ = ["hop"]
