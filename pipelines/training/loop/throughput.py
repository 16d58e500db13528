"""Throughput and running losses of a training loop."""

import contextlib
import time
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.training.config.run import FinetuneConfig
from pipelines.training.loading.dataloader import Batch
from pipelines.training.loop.telemetry import CostMeter, measure_peak_memory


class ThroughputMeter:
    """Counter of rows, waiting time and losses of a training loop.

    Args:
        config: settings of the run.
        world: number of ranks.
        device: device of the losses, such as ``cuda:0``.
        costs: counts tokens and operations; None leaves them out.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        world: int,
        device: torch.device,
        costs: CostMeter | None = None,
    ) -> None:
        self._world, self._device, self._costs = world, device, costs
        self._names = list(config.tasks)
        self._start = self._mark = time.monotonic()
        self._pause = 0.0
        self.rows = 0
        self.waited = 0.0
        self.losses: dict[str, float] = {}
        self._since = {"rows": 0, "waited": 0.0, "steps": 0}
        self._sums = torch.zeros(len(self._names), 2, dtype=torch.float64, device=device)
        self._norm = torch.zeros(())
        self._lr = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds since the loop began, without evaluations."""
        return time.monotonic() - self._start - self._pause

    def iter_timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Iterate over the batches and count the time spent waiting for them."""
        iterator = iter(batches)
        while True:
            begin = time.monotonic()
            batch = next(iterator, None)
            if batch is None:
                return
            spent = time.monotonic() - begin
            self.waited += spent
            self._since["waited"] += spent
            yield batch

    def add(self, batch: Batch, loss: Tensor, norm: Tensor, lr: float, is_finite: Tensor) -> None:
        """Count a step, without reading a tensor of the device.

        Args:
            batch: rows of the step.
            loss: this rank's share of the global loss.
            norm: length of the gradient over all parameters, a scalar.
            lr: learning rate.
            is_finite: scalar bool; the gradient was finite.
        """
        index = self._names.index(batch.task)
        # One loss that is not finite would make the running mean NaN for the rest of the run.
        self._sums[index, 0] += loss.masked_fill(~is_finite, 0)
        self._sums[index, 1] += is_finite
        self.rows += batch.global_rows
        self._since["rows"] += batch.global_rows
        self._since["steps"] += 1
        self._norm, self._lr = norm, lr
        if self._costs is not None:
            self._costs.add(batch)

    def collect_metrics(self) -> dict[str, float]:
        """Return metrics since the last call. All ranks must call it together."""
        sums = self._sums.clone()
        if self._world > 1:
            # Each rank has a share of each loss, but counts every step.
            dist.all_reduce(sums)
            sums[:, 1] /= self._world
        now = time.monotonic()
        seconds = max(now - self._mark, 1e-9)
        values: dict[str, float] = {}
        for name, (total, count) in zip(self._names, sums.tolist(), strict=True):
            if count:
                mean = total / count
                # Running mean over about 20 steps of a task, for the progress line.
                weight = min(0.5, count / 20)
                known = self.losses.get(name, mean)
                self.losses[name] = known + weight * (mean - known) if name in self.losses else mean
                values[f"{name}/loss"] = mean
        values |= {
            "training/learning_rate": self._lr,
            "training/gradient_norm": float(self._norm),
            "training/rows_per_second": self._since["rows"] / seconds,
            "training/steps_per_second": self._since["steps"] / seconds,
            "training/waiting_for_data": self._since["waited"] / seconds,
        }
        values |= measure_peak_memory(self._device)
        if self._costs is not None:
            values |= self._costs.collect_metrics(seconds)
        self._sums.zero_()
        self._since = {"rows": 0, "waited": 0.0, "steps": 0}
        self._mark = now
        return values

    def format_losses(self) -> str:
        """Return the running losses as one line."""
        return ", ".join(f"{name} {loss:.3f}" for name, loss in self.losses.items())

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside a block from the training time."""
        begin = time.monotonic()
        try:
            yield
        finally:
            spent = time.monotonic() - begin
            # Neither the total nor the current interval counts the pause.
            self._pause += spent
            self._mark += spent
