"""Small applications to read and to run."""
