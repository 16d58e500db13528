"""Plan of a training run before it starts: memory, operations and rate on given GPUs."""
