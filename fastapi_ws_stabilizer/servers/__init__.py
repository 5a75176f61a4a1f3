"""The ASGI servers that this library runs under."""
