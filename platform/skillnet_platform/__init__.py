"""Platform services: configuration, storage, Ray, MLflow and the command line.

The package imports no models and no corpora. Its modules load Ray and MLflow only when needed.
``load_run`` loads on first use, so importing the package does not import pandas.
"""

import gc
from typing import Any

__version__ = "0.1.0"

# Python's default of 700 suits small programs. The libraries that commands and workers import
# make 600,000 objects that stay, and searching them took a sixth of the import.
gc.set_threshold(10_000, 10, 10)


# PEP 562, as in the package skillnet.
def __getattr__(name: str) -> Any:
    if name != "load_run":
        raise AttributeError(f"module 'skillnet_platform' has no attribute {name!r}")
    from skillnet_platform.run_frames import load_run

    return load_run
