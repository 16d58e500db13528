"""Configuration, metrics and evaluation of a run as pandas DataFrames, for notebooks.

run = skillnet_platform.load_run("my-run")
run.metrics.plot(x="step", y="text_classification/loss")
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skillnet_platform.config import flatten_tree, load_yaml
from skillnet_platform.errors import UserError, suggest_name
from skillnet_platform.storage import run_root

if TYPE_CHECKING:
    import pandas as pd

CONFIG, PROGRESS, EVALUATION = "config.yaml", "progress.jsonl", "evaluation.csv"


@dataclass(frozen=True)
class LoadedRun:
    """A run, finished or not.

    Args:
        name: folder of the run below the run root.
        folder: directory of its files; ``folder / "model"`` is its final model.
        configuration: columns ``key`` (dotted) and ``value``.
        metrics: a row per logged step: ``step``, ``time`` (UTC) and a column per metric.
        evaluation: rows of the final evaluation with their intervals; empty before it.
    """

    name: str
    folder: Path
    configuration: "pd.DataFrame"
    metrics: "pd.DataFrame"
    evaluation: "pd.DataFrame"


def load_run(name: str | Path) -> LoadedRun:
    """Read the files of a run; no tracking server is asked.

    Args:
        name: identifier of a run below the run root, or the path of its folder.

    Raises:
        UserError: there is no such run, or its configuration is damaged.
    """
    import pandas as pd

    folder = next(
        (path for path in (run_root() / name, Path(name)) if (path / CONFIG).is_file()), None
    )
    if folder is None:
        known = sorted(path.parent.name for path in run_root().glob(f"*/{CONFIG}"))
        raise UserError(f"{name}: no run in {run_root()}{suggest_name(str(name), known)}")
    settings = flatten_tree(load_yaml(folder / CONFIG))
    evaluation = folder / EVALUATION
    return LoadedRun(
        folder.name,
        folder,
        pd.DataFrame(settings.items(), columns=["key", "value"]),
        pd.DataFrame(_read_metrics(folder / PROGRESS)),
        pd.read_csv(evaluation) if evaluation.is_file() else pd.DataFrame(),
    )


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return step, time and metrics of each logged step, in order; later values win."""
    import pandas as pd

    rows: dict[int, dict[str, Any]] = {}
    for line in path.read_bytes().split(b"\n") if path.is_file() else ():
        # A running process may be writing the last line.
        try:
            entry = json.loads(line)
            step, metrics = int(entry["step"]), entry["metrics"]
        except (ValueError, KeyError, TypeError):
            continue
        row = rows.setdefault(step, {"step": step})
        row |= {"time": pd.to_datetime(entry["time"], unit="s", utc=True)} | metrics
    return [rows[step] for step in sorted(rows)]
