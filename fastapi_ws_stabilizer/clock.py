"""The clocks of the package. No other module reads the time."""

from __future__ import annotations

import time

monotonic = time.monotonic
"""Return seconds on a clock that never jumps. All durations use it."""

wall = time.time
"""Return seconds of wall time, for text that people read and for the expiry of tokens. No duration uses it."""

thread_cpu = time.thread_time
"""Return the seconds of CPU that the calling thread has used. Only the difference of two calls has a meaning."""
