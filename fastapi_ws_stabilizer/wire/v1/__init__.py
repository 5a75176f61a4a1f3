"""The wire format of `stabilizer.v1.json`."""
