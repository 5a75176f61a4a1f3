"""Fuzz tests: no input causes a crash, a hang or unbounded growth. `make fuzz` runs them for longer."""
