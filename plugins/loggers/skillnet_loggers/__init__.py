"""Loggers of training runs beside MLflow: TensorBoard, and Weights & Biases."""

# Before torch: it sets the threshold of the garbage collector.
import skillnet_platform  # noqa: F401
