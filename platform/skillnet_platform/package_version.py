"""Version of an installed package, also where its metadata is damaged."""

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
