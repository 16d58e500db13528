"""Models in repositories of the Hugging Face Hub: download of all tasks, or of the files of one.

:meth:`skillnet.multitask_model.TaskModel.from_pretrained` calls :func:`find_model_folder`. The
manifest of a saved model lists the weight files of each task, so that one can be downloaded alone.
"""

import re
from pathlib import Path

from skillnet.serialization import check_inside, read_manifest
from skillnet.skills import nearest_hint

#: ``owner/name`` of a repository.
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
#: Files of a model beside its weights; the manifest first.
ABOUT = ("manifest.json", "config.json", "serving.json", "tokenizer.json")


def find_model_folder(address: str | Path, task: str | None = None) -> Path:
    """Return the folder of a saved model; download it if it is a repository of the Hub.

    Args:
        address: a folder, or ``owner/name`` of a repository. A folder of this name comes first.
        task: download only the files that this task reads.

    Raises:
        ValueError: the repository is not available, is no saved model, or has no such task.
    """
    folder = Path(address).expanduser()
    if isinstance(address, Path) or folder.exists() or not REPOSITORY.fullmatch(address):
        return folder
    folder = _download(address, list(ABOUT))
    if task is None:
        return _download(address, [*ABOUT, "*.safetensors", "captions-*.json"])
    manifest = read_manifest(folder)
    tasks = manifest.get("tasks")
    files = tasks.get(task) if isinstance(tasks, dict) else None
    if not isinstance(files, list) or not all(isinstance(name, str) for name in files):
        known = list(tasks) if isinstance(tasks, dict) else []
        raise ValueError(f"{address}: no task {task!r}{nearest_hint(task, known)}")
    for name in files:
        check_inside(folder / "manifest.json", name)
    return _download(address, [*ABOUT, *files, f"captions-{task}.*"])


def _download(repository: str, patterns: list[str]) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # Real files, because the loader rejects links; the Hub's cache consists of them.
    folder = Path(constants.HF_HOME) / "skillnet" / repository.replace("/", "--")
    try:
        snapshot_download(repository, allow_patterns=patterns, local_dir=folder)
    except (HFValidationError, HfHubHTTPError, OSError, ValueError) as error:
        raise ValueError(
            f"{repository}: no folder of this name, and the Hub does not provide it "
            f"({type(error).__name__}). Check the name, the connection and HF_TOKEN"
        ) from None
    return folder
