"""Ranking of the rows of a corpus, and the page of the results."""
