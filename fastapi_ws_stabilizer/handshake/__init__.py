"""The opening handshake, from admission to an open connection or a rejection."""
