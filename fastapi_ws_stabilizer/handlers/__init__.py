"""Hooks and message handlers: registration, validation, calls."""
