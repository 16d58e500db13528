"""TODO: package sweeps/interpretation."""
