"""Options of a corpus and its folds."""
