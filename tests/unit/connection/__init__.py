"""Unit tests of `fastapi_ws_stabilizer.connection`."""
