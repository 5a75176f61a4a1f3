"""The pages tell the truth: their code runs, their tables are those of the package, what they name exists."""
