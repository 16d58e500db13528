"""TODO: package pipelines/training/ray_train."""
