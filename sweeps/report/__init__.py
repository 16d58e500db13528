"""TODO: package sweeps/report."""
