"""Resolve the directory of a sweep or study, on the local disk and in an object store."""

from pathlib import Path

from pipelines.training.runs.mirror import RunMirror
from skillnet_platform.storage import directories, run_root
from skillnet_platform.storage.location import Location


def resolve_result_folder(root: Location, name: str) -> tuple[Path, RunMirror | None]:
    """Return the local directory of a sweep or study, and its mirror in an object store.

    Args:
        root: directory or URI that contains the results.
        name: name of the sweep or study.

    Returns:
        The local directory, and the mirror; None if ``root`` is a directory.
    """
    if isinstance(root, Path):
        return root / name, None
    # Files are written locally first, then mirrored to the object store.
    folder = run_root() / name
    return folder, RunMirror(directories.join_uri(root, name), folder)
