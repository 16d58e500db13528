"""The folder of a run: layout, identity, checkpoints, progress, mirror, trained models."""
