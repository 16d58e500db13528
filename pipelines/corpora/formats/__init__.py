"""TODO: package pipelines/corpora/formats."""
