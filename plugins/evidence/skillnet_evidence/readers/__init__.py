"""Readers of scores: tables, and the results that other evaluation tools write."""
