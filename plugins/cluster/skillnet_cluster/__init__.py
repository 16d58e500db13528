"""Commands around a cluster: check its nodes, send jobs to it, and pin its packages."""

# Before torch: it sets the threshold of the garbage collector.
import skillnet_platform  # noqa: F401
