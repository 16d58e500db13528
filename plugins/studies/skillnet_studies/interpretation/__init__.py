"""Measure and draw the effect of the skills of a trained model."""
