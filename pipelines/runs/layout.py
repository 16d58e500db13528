"""TODO: pipelines.runs.layout."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.config.run import FinetuneConfig
from skillnet_platform import config as configuration
from skillnet_platform.storage import (
    atomic_write,
    read_record,
)

if TYPE_CHECKING:
    pass

CONFIG = "config.yaml"
RUN = "run.json"
RESULT = "result.json"


def make_folder(config: FinetuneConfig, run: Path) -> None:
    """Make the folder of a new run, which takes the name: only when nothing may be refused."""
    stored = run / CONFIG
    if not stored.is_file():
        with atomic_write(stored, "w") as stream:
            stream.write(configuration.to_yaml(config))


def read_result(path: Path) -> dict[str, Any]:
    """The result of a run, with all that its commands show.

    Raises:
        UserError: the file is damaged.
    """
    shown: dict[str, type | tuple[type, ...]] = {
        "step": int,
        "seconds": (int, float),
        "model": str,
        "name": str,
        "evaluation": list,
    }
    remedy = "remove it, and the same command goes on from the newest checkpoint"
    return read_record(path, shown, remedy)
