"""TODO: package pipelines/runs."""
