"""Platform services: configuration, storage, Ray, MLflow and the command line.

The package imports no models and no corpora. Its modules load Ray and MLflow only when needed.
"""

__version__ = "0.1.0"
