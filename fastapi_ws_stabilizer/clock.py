"""The one place where time is read."""

from __future__ import annotations

import time

monotonic = time.monotonic
"""Seconds on a clock that never jumps: the only one that durations are measured with."""

wall = time.time
"""Seconds of wall time: for what people read, and for until when a token is good. Nothing is measured with it."""
