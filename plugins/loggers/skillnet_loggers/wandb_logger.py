"""Logger ``wandb``: the metrics of a run in Weights & Biases, or in files for it."""

from pathlib import Path
from typing import Any

import wandb

from skillnet_platform.errors import UserError

#: File in the run's folder with the id that W&B knows the run by.
ID_FILE = "wandb-id"


class WandbLogger:
    """Client of one W&B run, which has the name of the run and the project of its experiment.

    Its files are in ``wandb`` of the run's folder. The environment of W&B applies, such as
    ``WANDB_MODE=offline``.
    """

    def start(self, folder: Path, config: dict[str, Any]) -> None:
        """Open the run; an interrupted one continues.

        Raises:
            UserError: nobody is logged in, or no server answers.
        """
        file = folder / ID_FILE
        try:
            self._run = wandb.init(
                project=config["tracking"]["experiment"],
                name=folder.name,
                id=file.read_text() if file.is_file() else None,
                resume="allow",
                dir=folder,
                config=config,
                # The command's progress and messages stay as they are.
                settings=wandb.Settings(console="off", quiet=True),
            )
        except wandb.Error as error:
            raise UserError(
                f"tracking.loggers: wandb: {error}. Log in with `wandb login`, or set "
                "WANDB_MODE=offline and send the files later with `wandb sync`"
            ) from error
        file.write_text(self._run.id)

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        """Record metrics, named ``task/metric``; W&B groups them by task."""
        self._run.log(values, step=step)

    def finish(self) -> None:
        """Send what is left and close the run."""
        self._run.finish()
