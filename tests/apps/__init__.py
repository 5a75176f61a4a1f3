"""Whole apps, written as a user writes them from the README: what they need, the library has to do."""
