"""Tests of the pages: their code runs, their tables match the package, and the names on them exist."""
