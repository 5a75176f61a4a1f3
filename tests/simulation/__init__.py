"""Client and server of `stabilizer.v1.json` in virtual time, against a network with random faults."""
