"""TODO: package pipelines/corpora/readers."""
