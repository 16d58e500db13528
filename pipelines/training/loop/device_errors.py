"""Errors of a device during training, as one message.

CUDA reports a lost device, or memory that ends, by an exception of any operation.
:class:`DeviceWatch` knows the step, and turns the exception into a message that names node, device,
step, the newest checkpoint and the remedy. The starters of workers use it:
:mod:`pipelines.training.loop.run` and :mod:`pipelines.training.loop.ray_train.fit`.
"""

import contextlib
import platform
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from pipelines.training.config.run import FinetuneConfig
from pipelines.training.runs.checkpoints import step_of
from skillnet_platform.errors import UserError, first_line

#: Texts of CUDA and its libraries in exceptions without a class of their own.
_DEVICE_TEXTS = re.compile(r"CUDA error|CUDA driver error|CUBLAS_STATUS|CUDNN_STATUS|ECC error")


class DeviceLostError(RuntimeError):
    """Loss of a device during training. The message states what was saved and what to do."""


class DeviceWatch:
    """Callback of the training loop that knows the step, for messages about the device.

    Args:
        config: settings of the run.
        folder: directory of the run.
    """

    def __init__(self, config: FinetuneConfig, folder: Path) -> None:
        self._config, self._folder = config, folder
        self._step: int | None = None

    def on_train_start(self, folder: Path | None, rank: int) -> None:
        """Do nothing: the folder is known."""

    def on_step_start(self, step: int) -> None:
        """Keep the number of the step."""
        self._step = step

    @contextlib.contextmanager
    def explain_errors(self) -> Iterator[None]:
        """Explain errors of the device inside the block.

        Raises:
            UserError: the memory of the device is too small; a restart would not help.
            DeviceLostError: the device failed; Ray restarts the workers.
        """
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise UserError(f"{self._place()}: out of memory. {self._memory_remedy()}") from error
        except RuntimeError as error:
            is_known = isinstance(error, torch.AcceleratorError)
            if not is_known and not _DEVICE_TEXTS.search(str(error)):
                raise
            raise DeviceLostError(
                f"{self._place()}: the device failed ({first_line(error)}). {self._saved()}. Check "
                "the card with `nvidia-smi` and `dmesg`, and run the same command with --name "
                f"{self._config.name} to resume"
            ) from error

    def _place(self) -> str:
        when = "before the first step" if self._step is None else f"in step {self._step + 1}"
        return f"{platform.node()}, {_describe_device()}, {when}"

    def _memory_remedy(self) -> str:
        training = self._config.training
        workers = max(training.workers, 1)
        largest = max(task.batch_size for task in self._config.tasks.values())
        rows = min(-(-largest // workers), training.micro_batch_size or largest)
        # Options that a resumed run may change: none of them belongs to its identity.
        remedies = [f"--training.micro_batch_size {rows // 2}"] if rows > 1 else []
        if not training.activation_checkpointing:
            remedies.append("--training.activation_checkpointing true")
        if not remedies:
            return f"{self._saved()}. It needs a larger GPU, or more of them; see `skillnet plan`"
        return (
            f"{self._saved()}. Use {' or '.join(remedies)} with --name {self._config.name}; see "
            "`skillnet plan`"
        )

    def _saved(self) -> str:
        steps = [step_of(path.name) for path in (self._folder / "checkpoints").glob("step-*")]
        if not steps:
            return "No checkpoint exists yet, so the run starts again"
        return f"The checkpoint of step {max(steps)} is kept"


def _describe_device() -> str:
    # A lost device may not answer, but its number is known without it.
    with contextlib.suppress(Exception):
        if torch.cuda.is_available():
            return f"GPU {torch.cuda.current_device()}"
    return "its device"
