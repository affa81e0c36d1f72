"""What a user of a world reaches for: planners, monitors and inference arrive here, on the public API only."""
