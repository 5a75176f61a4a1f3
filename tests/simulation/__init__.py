"""Client and server of `stabilizer.v1.json` against a network that does its worst, on a clock that does not wait."""
