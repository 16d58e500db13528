"""Sweeps, studies and interpretation: many training runs, compared with statistics.

``skillnet sweep``, ``skillnet compare`` and ``skillnet interpret`` are the modules at the top.
"""
