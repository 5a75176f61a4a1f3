"""Tests of who is connected, what reaches them, and whether they live."""
