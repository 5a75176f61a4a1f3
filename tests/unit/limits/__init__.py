"""Tests of what connections may take."""
