"""From shards to a trained model: loading, loop, checkpoints, evaluation, runs, growth."""
