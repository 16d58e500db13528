"""TODO: package sweeps/study."""
