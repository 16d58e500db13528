"""Files in the folder of a run, and reading and creating them."""

from pathlib import Path
from typing import Any

from pipelines.config.run import FinetuneConfig
from skillnet_platform import config as configuration
from skillnet_platform.storage import atomic_write, read_record

CONFIG = "config.yaml"
RUN = "run.json"
RESULT = "result.json"


def create_run_folder(config: FinetuneConfig, run: Path) -> None:
    """Create the folder of a new run with its configuration; an existing one stays.

    Callers validate the run before: the folder reserves the run's name.

    Args:
        config: of the run.
        run: its folder.
    """
    stored = run / CONFIG
    if not stored.is_file():
        with atomic_write(stored, "w") as stream:
            stream.write(configuration.to_yaml(config))


def read_result(path: Path) -> dict[str, Any]:
    """Read the result of a run and check the keys that commands show.

    Args:
        path: of ``result.json``.

    Raises:
        UserError: the file is damaged.
    """
    required: dict[str, type | tuple[type, ...]] = {
        "step": int,
        "seconds": (int, float),
        "model": str,
        "name": str,
        "evaluation": list,
    }
    remedy = "remove it, and the same command resumes from the newest checkpoint"
    return read_record(path, required, remedy)
