"""Read finished runs and compare systems with intervals, tests and claims."""
