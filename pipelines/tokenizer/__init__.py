"""TODO: package pipelines/tokenizer."""
