"""What prints the performance tables."""
