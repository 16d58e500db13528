"""TODO: package pipelines/io."""
