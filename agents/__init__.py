"""What users of a world reach for: planners, monitors and inference, on the public API only."""
