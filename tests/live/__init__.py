"""Behaviour on real servers in subprocesses, with real clients."""
