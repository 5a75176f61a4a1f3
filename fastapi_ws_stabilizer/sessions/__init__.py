"""What outlives a connection: tokens, sessions, the log that is replayed."""
