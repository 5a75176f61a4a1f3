"""Integration with ASGI servers."""
