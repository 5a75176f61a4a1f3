"""All connections of one manager: who is there, what reaches them, and whether they live."""
