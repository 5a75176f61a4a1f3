"""Unit tests; their folders mirror the package."""
