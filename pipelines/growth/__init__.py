"""Growing a trained model: its settings, its runs, the proof that the rest stayed as it was."""
