"""Settings that all tests share."""

from __future__ import annotations

from hypothesis import settings

from tests.support.versions import HAS_DIRECT_TRANSPORT

# The machine may be busy with servers while an example runs. A rule is broken by its result, not by its duration.
settings.register_profile("ours", deadline=None, print_blob=True)
settings.load_profile("ours")

if not HAS_DIRECT_TRANSPORT:
    # On these versions the protocol class works like uvicorn's own, or does not exist. `unit/compat/test_uvicorn.py`
    # tests that; these files test the class itself.
    collect_ignore = [
        "fuzz/test_found.py",
        "fuzz/test_protocol.py",
        "unit/servers/test_frame_parser.py",
        "unit/servers/test_paced_parser.py",
        "unit/servers/test_upgrade.py",
        "unit/servers/test_uvicorn_garbage.py",
        "unit/servers/test_uvicorn_protocol.py",
    ]
