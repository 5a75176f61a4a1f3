"""Tests of one connection."""
