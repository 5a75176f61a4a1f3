"""Tests of what outlives a connection."""
