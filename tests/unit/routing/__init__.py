"""Tests of the way from events and messages to the user's functions."""
