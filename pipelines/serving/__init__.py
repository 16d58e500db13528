"""TODO: package pipelines/serving."""
