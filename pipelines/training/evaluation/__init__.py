"""Evaluation: metrics of a model on prepared corpora, simple baselines, row outcomes, tables."""
