"""Numbers for a system that watches: durations by how long they took, and the text that Prometheus reads."""
