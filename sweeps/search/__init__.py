"""TODO: package sweeps/search."""
