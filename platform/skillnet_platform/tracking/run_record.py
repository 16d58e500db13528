"""``run.json``: the MLflow run of a folder.

The file gets a random key before the MLflow run is created, and the run carries the key as a tag.
A command that was killed between the two steps finds its run by the key.
"""

import uuid
from pathlib import Path

from skillnet_platform.errors import UserError
from skillnet_platform.storage import read_record, write_json

REMEDY = "remove that file, and the same command records into a new run"


def read_run_id(path: Path) -> str | None:
    """Return the id of the MLflow run in a ``run.json``; None without a file or a run.

    Raises:
        UserError: the file is damaged.
    """
    return _read(path)[0] if path.is_file() else None


def reserve_run(path: Path) -> tuple[str | None, str]:
    """Return the id of the recorded run, if it has one, and the key to find or create it with.

    Args:
        path: location of ``run.json``; written if it is missing.

    Raises:
        UserError: the file is damaged.
    """
    if path.is_file():
        return _read(path)
    key = uuid.uuid4().hex
    write_json(path, {"run_id": None, "key": key})
    return None, key


def write_run_id(path: Path, run_id: str, uri: str) -> None:
    """Record the MLflow run of a folder.

    Args:
        path: location of ``run.json``, see :func:`reserve_run`.
        run_id: MLflow's identifier of the run.
        uri: address of the tracker, such as ``http://host:5000``.
    """
    write_json(path, {"run_id": run_id, "key": _read(path)[1], "uri": str(uri)})


def _read(path: Path) -> tuple[str | None, str]:
    record = read_record(path, {"run_id": (str, type(None))}, REMEDY)
    run_id, key = record.get("run_id"), record.get("key", "")
    if run_id == "" or not isinstance(key, str) or not (run_id or key):
        raise UserError(f"{path} is damaged: it names no MLflow run; {REMEDY}")
    return run_id, key
