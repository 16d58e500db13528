"""TODO: package sweeps/config."""
