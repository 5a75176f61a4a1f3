"""Settings that all tests share."""

from __future__ import annotations

from hypothesis import settings

# The machine may be busy with servers while an example runs. A rule is broken by its result, not by its duration.
settings.register_profile("ours", deadline=None, print_blob=True)
settings.load_profile("ours")
