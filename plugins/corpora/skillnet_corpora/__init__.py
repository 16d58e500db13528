"""Corpora of the demo, layouts of the paper's corpora, and further corpora of the studies."""

# Before torch: it sets the threshold of the garbage collector.
import skillnet_platform  # noqa: F401
