"""One small server for each contender, run as `python -m benchmarks.apps.<name>` in its environment."""
