"""Versions that must be the same wherever a run has a process."""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("torch", "ray", "mlflow", "pyarrow", "tokenizers", "safetensors", "numpy")
#: Carries what the sender of a job has installed to the checks inside it.
VARIABLE = "SKILLNET_VERSIONS"


def installed_versions() -> dict[str, str]:
    """Python's and the packages' versions here; "" for what is not installed.

    A local part such as +cpu is left out: the same code for another device.
    """
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            found[name] = ""
    return found


def version_variable() -> dict[str, str]:
    """The environment variable that tells a job with which versions its code was tried."""
    return {VARIABLE: json.dumps(installed_versions())}


def expected_versions() -> dict[str, str]:
    """What the sender of this job has installed; empty outside of a job."""
    told = json.loads(os.environ.get(VARIABLE) or "{}")
    return {str(key): str(value) for key, value in told.items()}
