"""One connection: the server's `receive` fills an inbox, and an outbox calls the server's `send`."""
