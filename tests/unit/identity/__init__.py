"""Tests of how a client says who it is."""
