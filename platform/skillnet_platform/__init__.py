"""Services every run stands on: configuration, storage, Ray, MLflow, the command line.

Knows nothing of models or corpora; nothing heavy is imported here.
"""

__version__ = "0.1.0"
