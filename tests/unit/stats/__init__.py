"""Tests of the stats router."""
