"""Benchmarks of the library and its peers in one run: `make bench`."""
