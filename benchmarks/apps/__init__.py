"""One small server for each contender, run as `python -m benchmarks.apps.<name>` in the environment that has it."""
