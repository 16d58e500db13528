"""The HTTP server, the search in corpora, and exports of trained models."""

# Before torch: it sets the threshold of the garbage collector.
import skillnet_platform  # noqa: F401
