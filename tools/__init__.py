"""What helps to work on the project. Nothing of it is installed."""
