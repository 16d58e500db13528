"""TODO: sweeps.config.location."""

from pathlib import Path

from pipelines.runs.mirror import RunMirror
from skillnet_platform.storage import directories, run_root
from skillnet_platform.storage.location import Place


def resolve_result_folder(root: Place, name: str) -> tuple[Path, RunMirror | None]:
    """The folder of a sweep or study on this disk, and its place in a store if it is kept in one.

    Args:
        root: the place that it lies in.
        name: of the sweep or study.
    """
    if isinstance(root, Path):
        return root / name, None
    folder = run_root() / name
    return folder, RunMirror(directories.join(root, name), folder)
