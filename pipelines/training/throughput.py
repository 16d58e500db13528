"""Counts, times and running losses of a training loop."""

import contextlib
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.config.run import FinetuneConfig
from pipelines.loading.dataloader import Batch, Prefetcher


class Meter:
    """Counts, times and running losses of a loop."""

    def __init__(
        self, config: FinetuneConfig, start: int, world: int, device: torch.device
    ) -> None:
        self._world, self._device = world, device
        self._names = list(config.tasks)
        self._start = self._mark = time.monotonic()
        self._pause = 0.0
        self.rows = self.skipped = 0
        self.waited = 0.0
        self.losses: dict[str, float] = {}
        self._since = {"rows": 0, "waited": 0.0, "steps": 0}
        self._sums = torch.zeros(len(self._names), 2, dtype=torch.float64, device=device)
        self._norm = torch.zeros(())
        self._lr = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds since the loop began, evaluations left out."""
        return time.monotonic() - self._start - self._pause

    def timed(self, batches: Prefetcher) -> Iterator[Batch]:
        """The batches; time spent waiting for them is counted."""
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

    def add(self, batch: Batch, loss: Tensor, norm: Tensor, lr: float, skipped: bool) -> None:
        """One step is done. ``loss`` is this rank's share of the global one."""
        index = self._names.index(batch.task)
        self._sums[index, 0] += loss
        self._sums[index, 1] += 1
        self.rows += batch.global_rows
        self._since["rows"] += batch.global_rows
        self._since["steps"] += 1
        self.skipped += skipped
        self._norm, self._lr = norm, lr

    def values(self, step: int) -> dict[str, float]:
        """Metrics since the last call. With several ranks all of them call it together."""
        sums = self._sums.clone()
        if self._world > 1:
            # Each rank holds a share of each loss, but counts every step.
            dist.all_reduce(sums)
            sums[:, 1] /= self._world
        now = time.monotonic()
        seconds = max(now - self._mark, 1e-9)
        values: dict[str, float] = {}
        for name, (total, count) in zip(self._names, sums.tolist(), strict=True):
            if count:
                mean = total / count
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
        self._sums.zero_()
        self._since = {"rows": 0, "waited": 0.0, "steps": 0}
        self._mark = now
        return values

    def words(self) -> str:
        """Running losses, short."""
        return ", ".join(f"{name} {loss:.3f}" for name, loss in self.losses.items())

    def agree(self, flag: bool) -> bool:
        """Rank 0's opinion, on all ranks."""
        if self._world == 1:
            return flag
        shared = torch.tensor([float(flag)], device=self._device)
        dist.broadcast(shared, src=0)
        return bool(shared.item())

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside is not training time."""
        begin = time.monotonic()
        try:
            yield
        finally:
            spent = time.monotonic() - begin
            self._pause += spent
            self._mark += spent
