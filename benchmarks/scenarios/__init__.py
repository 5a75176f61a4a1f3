"""The scenarios. Each is a function that takes the bench and returns its tables."""
