"""Listeners of the event bus, such as the log."""
