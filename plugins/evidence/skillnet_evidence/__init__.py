"""Statistics of comparisons: intervals, paired tests, claims and power over seeds and units.

It reads per-row scores of any project: ``skillnet-evidence compare scores.csv``. It needs numbers
alone: no PyTorch, no Ray, and no other package of the repository.
"""
