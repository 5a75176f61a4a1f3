"""What is fuzzed: each target takes bytes, and raises when a rule is broken."""
