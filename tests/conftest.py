"""Settings that all tests share."""

from __future__ import annotations

import importlib

from hypothesis import settings

# The machine may be busy with servers while an example runs. A rule is broken by its result, not by its duration.
settings.register_profile("ours", deadline=None, print_blob=True)
settings.load_profile("ours")

try:
    importlib.import_module("fastapi_ws_stabilizer.servers.uvicorn.protocol")
except ImportError:
    # The lowest uvicorn that the project runs on does not have what the protocol class is built on. There
    # `unit/compat/test_uvicorn.py` tests the fallback; these files test the class itself.
    collect_ignore = [
        "fuzz/test_found.py",
        "fuzz/test_protocol.py",
        "unit/servers/test_paced_parser.py",
        "unit/servers/test_uvicorn_protocol.py",
    ]
