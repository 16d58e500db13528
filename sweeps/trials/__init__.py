"""TODO: package sweeps/trials."""
