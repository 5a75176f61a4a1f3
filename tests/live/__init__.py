"""Tests of the library on real servers in subprocesses, with real clients."""
