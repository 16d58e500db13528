"""TODO: package pipelines/preprocessing."""
