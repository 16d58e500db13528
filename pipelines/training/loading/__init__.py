"""From shards to batches: samplers, datasets, augmentation, masks and the data loader."""
