"""What is measured. Each scenario is a function that takes the bench and returns its tables."""
