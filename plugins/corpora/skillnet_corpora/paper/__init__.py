"""Readers of the five corpora of the paper, as their owners publish them."""
