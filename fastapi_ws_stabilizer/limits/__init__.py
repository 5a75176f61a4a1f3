"""Connection limits, and rates of handshakes, messages and bytes."""
