"""Unit tests of `fastapi_ws_stabilizer.hub`."""
