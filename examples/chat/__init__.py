"""A chat room for two browser tabs or more: `python -m examples.chat`."""
