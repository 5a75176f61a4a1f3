"""Wire format of `stabilizer.v1.json`."""
