"""Tests of each part by itself; their folders mirror the package."""
