"""TODO: package pipelines/corpora/builtin."""
