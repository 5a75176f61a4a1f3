"""Memory accounting: bytes held for each client, the limits, and eviction."""
