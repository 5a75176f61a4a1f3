"""Exporters: what a manager has counted, in the formats of monitoring systems."""
