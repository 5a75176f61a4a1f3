"""Plain counts of durations; `observability` exports them."""
