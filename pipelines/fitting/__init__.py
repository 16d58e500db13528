"""Training in Python, without Ray and MLflow: data in memory, own loops, losses and metrics."""

from pipelines.fitting.training_data import TrainingData

__all__ = ["TrainingData"]
