"""A synthetic corpus whose entropy is known exactly."""
