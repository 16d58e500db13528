"""TODO: package pipelines/config."""
