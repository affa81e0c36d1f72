"""What agents do with a world, proven in the real environment: `worldmodel evaluate agents`."""
