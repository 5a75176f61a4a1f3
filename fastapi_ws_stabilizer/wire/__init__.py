"""Wire formats without I/O: encoded messages, control frames, JSON and deflate."""
