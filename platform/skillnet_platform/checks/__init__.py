"""Checks of ``skillnet doctor``: one machine, or every node of a cluster."""
