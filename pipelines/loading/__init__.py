"""TODO: package pipelines/loading."""
