"""Installed packages: their versions, and the extras of this project that install them.

A model is loaded and run without the extras. The command line names the extra of a missing package.
"""

from importlib.metadata import PackageNotFoundError, version


def find_version(name: str) -> str:
    """Return the version of a package; "" if it is not installed or has no metadata.

    An interrupted installation leaves a ``.dist-info`` folder without metadata.

    Args:
        name: distribution, as pip lists it.
    """
    try:
        return version(name) or ""
    # Python returns None for missing metadata. The backport, which replaces Python's finder once
    # MLflow is imported, raises its own FileNotFoundError.
    except (PackageNotFoundError, FileNotFoundError):
        return ""


#: Package -> extra that installs it.
EXTRA_OF_PACKAGE = {
    "ray": "train",
    "mlflow": "train",
    "sqlalchemy": "train",
    "psutil": "train",
    "pandas": "train",
    "transformers": "train",
    "timm": "train",
    "optuna": "train",
    "sklearn": "train",
    "matplotlib": "train",
    "jinja2": "train",
    "boto3": "cluster",
    "sentence_transformers": "sentence-transformers",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "export",
}


def extra_command(extra: str) -> str:
    """Return how to install an extra: from a clone, because no package index has this project.

    Args:
        extra: name of pyproject.toml.
    """
    return f"in a clone, pip install -e plugins/evidence -e '.[{extra}]'"


def describe_missing_extra(error: BaseException) -> str | None:
    """Return which extra to install, if an error is the absence of a package of one.

    Args:
        error: the exception.
    """
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    package = (name or "").partition(".")[0]
    extra = EXTRA_OF_PACKAGE.get(package)
    if extra is None:
        return None
    return (
        f"the package {package} is not installed. Install the extra {extra}: {extra_command(extra)}"
    )
