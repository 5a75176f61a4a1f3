"""Fuzz targets: each takes bytes, and raises when a rule is broken."""
