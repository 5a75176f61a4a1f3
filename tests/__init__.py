"""The tests: `unit` mirrors the package, `live` runs real servers, `docs` runs the examples and the pages' code."""
