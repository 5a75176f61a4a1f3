"""Constant that the computing app and its tests share."""

STEPS = 4
