"""A chat room for two or more browser tabs: `python -m examples.chat`."""
