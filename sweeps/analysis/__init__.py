"""TODO: package sweeps/analysis."""
