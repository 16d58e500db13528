"""Hugging Face and timm: specialists, encoders of the libraries, and their published weights."""

# Before torch: it sets the threshold of the garbage collector.
import skillnet_platform  # noqa: F401
