"""TODO: package pipelines/evaluation."""
