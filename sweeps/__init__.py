"""Sweeps, studies and interpretation: many training runs, compared with statistics.

``skillnet sweep``, ``skillnet compare`` and ``skillnet interpret`` are the modules at the top.
"""

# Before torch: it sets the threshold of the garbage collector.
import skillnet_platform  # noqa: F401
