"""Device, sizes and configurations that all parts of ``make gpu`` measure."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch

from benchmarks.measure import Result
from pipelines.finetune import main as finetune
from pipelines.pretrain import main as pretrain
from pipelines.training.config.run import FinetuneConfig
from skillnet_platform.cluster.gpu_types import GpuType, describe_device

#: Widths of a configuration that small corpora are trained with.
WIDTHS = ("dim", "num_layers", "num_heads", "ffn_dim", "embedding_dim")
#: Those of a rehearsal.
TINY = dict(zip(WIDTHS, (64, 2, 2, 128, 64), strict=True))
#: Rows of the small corpora, and of their batches.
ROWS, BATCH = 512, 64


def find_device() -> torch.device | None:
    """Return the GPU of this process, or None."""
    return torch.device("cuda") if torch.cuda.is_available() else None


def describe_card(device: torch.device) -> GpuType:
    """Return the type of a card; its rates are 0 if its data sheet is not known."""
    if device.type != "cuda":
        return GpuType("CPU", 1e6, 1.0, 0.0, 0.0)
    about = torch.cuda.get_device_properties(device)
    return describe_device(about.name, about.total_memory, (about.major, about.minor))


@dataclass
class GpuBench:
    """Device and sizes of the parts.

    Args:
        device: that is measured, such as ``cuda``.
        output: folder of traces.
        rounds: measured steps of each task.
        is_rehearsal: tiny sizes.
        scratch: empty folder that ends with the part.
    """

    device: torch.device
    output: Path
    rounds: int
    is_rehearsal: bool
    scratch: Path = field(default_factory=Path)

    @cached_property
    def card(self) -> GpuType:
        """Type of the device."""
        return describe_card(self.device)

    @property
    def is_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    def choose_size(self, whole: int, tiny: int) -> int:
        """Return a size, or the one of a rehearsal."""
        return tiny if self.is_rehearsal else whole

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def read_preset(self, preset: str) -> FinetuneConfig:
        """Return the configuration of a preset.

        Args:
            preset: ``base``; ``paper``, the sizes of the paper's inputs at that width; or
                ``pretraining``, the tasks that hide inputs at that width.
        """
        command = pretrain if preset == "pretraining" else finetune
        words = ["--config", "base", *["--config", "paper"] * (preset == "paper")]
        if self.is_rehearsal:
            words = self.list_width_options()
        return command.parse_arguments(words).joint()

    def list_width_options(self) -> list[str]:
        """Return the options of a command that give a model the width of a rehearsal."""
        return [word for name, x in TINY.items() for word in (f"--model.{name}", str(x))]

    def make_run(self, **training: object) -> FinetuneConfig:
        """Return a run of the width of ``base`` on small corpora, which are made first.

        Args:
            **training: settings in ``training``.
        """
        from tests.helpers.small_corpora import small_config, write_corpora

        data = self.scratch / "corpora"
        if not data.is_dir():
            write_corpora(data, rows=self.choose_size(ROWS, 24), test_rows=16)
        config = small_config(data, use_gpu=self.is_gpu, **{"precision": "auto", **training})
        wide = self.read_preset("base").model
        model = replace(config.model, **{name: getattr(wide, name) for name in WIDTHS})
        rows = self.choose_size(BATCH, 4)
        tasks = {name: replace(task, batch_size=rows) for name, task in config.tasks.items()}
        return replace(config, model=model, tasks=tasks)


#: Measures one thing, and yields each row as soon as it is there.
MeasuredPart = Callable[[GpuBench], Iterator[Result]]


def last_line(errors: str) -> str:
    """Return the last line that a command wrote, which says why it failed; "" without one."""
    return (errors.strip().splitlines() or [""])[-1].removeprefix("error: ")[:400]
