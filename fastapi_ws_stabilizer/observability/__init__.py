"""Listeners of the event bus."""
