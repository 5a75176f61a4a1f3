"""Whatever comes in: nothing crashes, nothing hangs, nothing grows. Run with the tests, and for long by `make fuzz`."""
