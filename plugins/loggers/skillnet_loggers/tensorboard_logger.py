"""Logger ``tensorboard``: the metrics of a run as event files in its folder."""

from pathlib import Path
from typing import Any

# It needs the package tensorboard, of the extra of this name.
from torch.utils.tensorboard import SummaryWriter


class TensorBoardLogger:
    """Writer of event files to ``tensorboard`` in the run's folder."""

    def start(self, folder: Path, config: dict[str, Any]) -> None:
        """Note the folder; TensorBoard needs no configuration."""
        self._folder = folder / "tensorboard"
        self._writer: SummaryWriter | None = None

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        """Record metrics, named ``task/metric``; TensorBoard groups them by task."""
        if self._writer is None:
            # A resumed run repeats the steps after its checkpoint: their first records are hidden.
            self._writer = SummaryWriter(str(self._folder), purge_step=step)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def finish(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
