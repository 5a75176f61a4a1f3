"""Memory accounting: what is held for each client, the limits, and eviction."""
