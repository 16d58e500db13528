"""Third-party metric, callback and logger."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from skillnet.objectives.base import NamedMetric, RowMetric

TOP_THREE = RowMetric(
    "classification", NamedMetric("top_3_accuracy", "top 3"), "run_observers:score_top_three"
)


def score_top_three(predictions: Any, targets: Any) -> tuple[Any, Any]:
    """Return whether the label of each row is among its three best classes, and ones."""
    best = np.argsort(-predictions, axis=1)[:, :3]
    hits = (best == targets["labels"][:, None]).any(1)
    return hits.astype(float), np.ones(len(hits))


class Heartbeat:
    """Callback: one file per worker, with the step that it works on."""

    def on_train_start(self, folder: Path | None, rank: int) -> None:
        """Choose the file."""
        self._file = None if folder is None else folder / f"heartbeat-{rank}.txt"

    def on_step_start(self, step: int) -> None:
        """Write the step."""
        if self._file is not None:
            self._file.write_text(str(step))


class LineLogger:
    """Logger: one line of JSON per record, in the folder of the run."""

    def start(self, folder: Path, config: dict[str, Any]) -> None:
        """Open the file."""
        self._lines = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._write({"seed": config["seed"]})

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        """Add a line."""
        self._write({"step": step, **values})

    def finish(self) -> None:
        """Close the file."""
        self._lines.close()

    def _write(self, record: dict[str, Any]) -> None:
        self._lines.write(json.dumps(record) + "\n")
