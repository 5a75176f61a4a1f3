"""Tests of how a manager stops."""
