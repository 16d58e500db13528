"""Versions that must be equal in all processes of a run."""

import json
import os
import platform

from skillnet_platform.package_version import find_version

PACKAGES = ("torch", "ray", "mlflow", "pyarrow", "tokenizers", "safetensors", "numpy")
#: Environment variable with the versions of the job's sender, for the checks inside the job.
VARIABLE = "SKILLNET_VERSIONS"


def installed_versions() -> dict[str, str]:
    """Return the versions of Python and the packages in this process; "" if not installed.

    A local part such as +cpu is dropped: it marks the same code for another device.
    """
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        found[name] = find_version(name).partition("+")[0]
    return found


def version_variable() -> dict[str, str]:
    """Return the environment variable with the versions installed here, for a job."""
    return {VARIABLE: json.dumps(installed_versions())}


def expected_versions() -> dict[str, str]:
    """Return the versions of the sender of this job; empty outside of a job."""
    sent = json.loads(os.environ.get(VARIABLE) or "{}")
    return {str(key): str(value) for key, value in sent.items()}
