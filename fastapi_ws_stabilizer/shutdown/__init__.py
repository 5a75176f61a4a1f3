"""Drain and shutdown of a manager."""
