"""Training: loop, optimizer, gradient sums, checkpoints, preemption, and evaluation of a run."""
