"""Growths from their configuration to a registered model: one, or several as jobs of a queue."""
