"""From events and messages of a connection to the user's functions."""
