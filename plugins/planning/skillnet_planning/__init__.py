"""Plan of a training run before it starts: memory, operations and rate on given GPUs."""

# Before torch: it sets the threshold of the garbage collector.
import skillnet_platform  # noqa: F401
