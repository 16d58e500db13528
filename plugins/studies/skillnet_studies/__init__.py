"""Comparisons of systems: studies, statistics, claims, reports, interpretation."""

# Before torch: it sets the threshold of the garbage collector.
import skillnet_platform  # noqa: F401
