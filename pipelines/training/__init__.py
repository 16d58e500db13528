"""Training: mixture of tasks, loop, gradient synchronisation, optimiser, checkpoints, precision."""
