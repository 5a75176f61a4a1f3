"""Small example applications."""
