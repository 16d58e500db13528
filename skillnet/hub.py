"""Models in repositories of the Hugging Face Hub: download of all tasks, or of the files of one.

:meth:`skillnet.multitask_model.TaskModel.from_pretrained` calls :func:`find_model_folder`. The
manifest of a saved model lists the weight files of each task, so that one can be downloaded alone.
"""

import re
from pathlib import Path
from urllib.parse import quote

from skillnet.serialization import check_inside, read_manifest
from skillnet.skills import nearest_hint

#: ``owner/name`` of a repository.
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
#: Files of a model beside its weights; the manifest first.
ABOUT = ("manifest.json", "config.json", "serving.json", "tokenizer.json")


def find_model_folder(
    address: str | Path, task: str | None = None, revision: str | None = None
) -> Path:
    """Return the folder of a saved model; download it if it is a repository of the Hub.

    Args:
        address: a folder, or ``owner/name`` of a repository. A folder of this name comes first.
        task: download only the files that this task reads.
        revision: branch, tag or commit of the repository; None takes the newest commit.

    Raises:
        ValueError: the repository is not available, is no saved model, or has no such task or
            revision; or a revision is given for a folder.
    """
    folder = Path(address).expanduser()
    if isinstance(address, Path) or folder.exists() or not REPOSITORY.fullmatch(address):
        if revision is not None:
            raise ValueError(
                f"{address}: revision={revision!r} is for a repository of the Hub, not for a "
                "folder. Leave it out, or give owner/name"
            )
        return folder
    folder = _download(address, list(ABOUT), revision)
    if task is None:
        return _download(address, [*ABOUT, "*.safetensors", "captions-*.json"], revision)
    manifest = read_manifest(folder)
    tasks = manifest.get("tasks")
    files = tasks.get(task) if isinstance(tasks, dict) else None
    if not isinstance(files, list) or not all(isinstance(name, str) for name in files):
        known = list(tasks) if isinstance(tasks, dict) else []
        raise ValueError(f"{address}: no task {task!r}{nearest_hint(task, known)}")
    for name in files:
        check_inside(folder / "manifest.json", name)
    return _download(address, [*ABOUT, *files, f"captions-{task}.*"], revision)


def _download(repository: str, patterns: list[str], revision: str | None) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # Real files, because the loader rejects links; the Hub's cache consists of them.
    name = repository.replace("/", "--") + (f"@{quote(revision, safe='')}" if revision else "")
    folder = Path(constants.HF_HOME) / "skillnet" / name
    try:
        snapshot_download(repository, revision=revision, allow_patterns=patterns, local_dir=folder)
    except (HFValidationError, HfHubHTTPError, OSError, ValueError) as error:
        wanted = f"revision {revision}" if revision else "it"
        raise ValueError(
            f"{repository}: no folder of this name, and the Hub does not provide {wanted} "
            f"({type(error).__name__}). Check the name, the connection and HF_TOKEN"
        ) from None
    return folder
