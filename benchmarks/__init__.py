"""Measures what the library costs, beside its peers, in one run: `make bench`."""
