"""Corpora beside the demo's: the paper's layouts and further corpora of the studies."""

# Before torch: it sets the threshold of the garbage collector.
import skillnet_platform  # noqa: F401
