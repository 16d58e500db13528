"""Stages that turn corpora into models, each of them a command."""

# Before torch: it sets the threshold of the garbage collector.
import skillnet_platform  # noqa: F401
