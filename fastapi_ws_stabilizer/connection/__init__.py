"""One connection: the server's `receive` feeds an inbox, the server's `send` is fed by an outbox."""
