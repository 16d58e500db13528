"""Corpora that only studies fetch."""
