"""What all tests share."""

from __future__ import annotations

from hypothesis import settings

# The machine may be busy with servers while an example runs; a rule is broken by its outcome, not by its time.
settings.register_profile("ours", deadline=None, print_blob=True)
settings.load_profile("ours")
