"""Unit tests of `fastapi_ws_stabilizer.limits`."""
