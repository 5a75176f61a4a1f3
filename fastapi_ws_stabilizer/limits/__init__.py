"""What connections may take."""
