"""Rate, memory and utilization of the devices of a training, as metrics and as gauges of Ray.

:class:`CostMeter` counts tokens and floating-point operations for
:class:`pipelines.training.loop.telemetry.ThroughputMeter`. :class:`GaugePublisher` publishes the
metrics of rank 0 through ``ray.util.metrics``. :class:`StepProfiler` records a profile.
"""

import contextlib
import re
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.training.config.run import FinetuneConfig, TrainingConfig
from pipelines.training.loading.dataloader import Batch
from pipelines.training.loop.task_groups import TaskGroups
from skillnet.modality import find_modality
from skillnet.multitask_model import TaskModel
from skillnet.skills import find_task
from skillnet_platform.cluster.gpu_types import GPU_TYPES, describe_device

#: Operations of a training step over those of its forward pass.
PASSES = 3
#: Folder of profiles in the folder of a run.
PROFILES = "profiles"
PROFILED_STEPS = 5
#: Metrics that become gauges.
_PREFIX = "training/"


def find_peak_flops(device: torch.device, is_bf16: bool) -> float | None:
    """Return the peak rate of a device in FLOP/s from its data sheet, or None if it is unknown.

    Args:
        device: device of the training, such as ``cuda:0``.
        is_bf16: products are in bf16; else in fp32.
    """
    if device.type != "cuda":
        return None
    about = torch.cuda.get_device_properties(device)
    capability = torch.cuda.get_device_capability(device)
    kind = describe_device(about.name, about.total_memory, capability)
    if kind.name not in GPU_TYPES:
        return None
    return 1e12 * (kind.bf16_tflops if is_bf16 else kind.fp32_tflops) or None


class CostMeter:
    """Counter of the tokens and operations of steps, without reading a tensor of a GPU.

    Real tokens count on a CPU, whose layers leave padding out, and padded ones on a GPU. Operations
    are those of the model, three times its forward pass: layers that are computed again do not
    count. A system without formulas has neither tokens nor operations.

    Args:
        model: module with the weights of the run.
        peak_flops: peak rate of the device in FLOP/s; None if unknown.
    """

    def __init__(self, model: TaskModel, peak_flops: float | None = None) -> None:
        # The base class counts by running the model, which a training must not do.
        self._model = model if type(model).flops is not TaskModel.flops else None
        self._peak = peak_flops
        self._known: dict[tuple[str, str, int], np.ndarray] = {}
        self._flops = self._tokens = 0.0

    @property
    def tokens(self) -> float:
        """Tokens since the metrics were collected, of all ranks that compute the same tasks."""
        return self._tokens

    def add(self, batch: Batch) -> None:
        """Count the rows of a step: operations of this rank, tokens of all ranks."""
        if self._model is None:
            return
        plans = find_task(batch.task, self._model.config.tasks).towers
        found = {t: _list_lengths(plan.modality, batch.towers[t]) for t, plan in plans.items()}
        lengths = {tower: values for tower, values in found.items() if values is not None}
        try:
            shortest = self._count(batch.task, dict.fromkeys(lengths, 1), "", 1)
            total = shortest * len(batch.rows)
            # The costs of towers add up, so few lengths are counted instead of all pairs of them.
            for tower, values in lengths.items():
                for length, rows in zip(*np.unique(values, return_counts=True), strict=True):
                    cost = self._count(batch.task, dict.fromkeys(lengths, 1), tower, int(length))
                    total = total + (cost - shortest) * rows
        except TypeError:
            # The formulas do not know a stem of a third party.
            self._model = None
            return
        self._flops += PASSES * float(total[0])
        # Other ranks have rows of about the same lengths.
        self._tokens += float(total[1]) * batch.global_rows / len(batch.rows)

    def _count(self, task: str, lengths: dict[str, int], tower: str, length: int) -> np.ndarray:
        """Return (operations, tokens) of a row in which one tower has another length."""
        assert self._model is not None
        key = (task, tower, length)
        if key not in self._known:
            changed = lengths | ({tower: length} if tower else {})
            self._known[key] = np.array(self._model.flops(task, changed), dtype=np.float64)
        return self._known[key]

    def collect_metrics(self, seconds: float, tokens: float | None = None) -> dict[str, float]:
        """Return metrics since the last call.

        Args:
            seconds: time since the last call, without pauses.
            tokens: those of all tasks; None takes those of this rank's.
        """
        values = {}
        if self._tokens:
            counted = self._tokens if tokens is None else tokens
            values["training/tokens_per_second"] = counted / seconds
            values["training/model_tflops_per_second"] = self._flops / seconds / 1e12
            if self._peak:
                values["training/model_flops_utilization"] = self._flops / seconds / self._peak
        self._flops = self._tokens = 0.0
        return values


def _list_lengths(modality: str, tensors: Mapping[str, Tensor]) -> np.ndarray | None:
    """Return the (B,) units of each row that the encoder computes; None for rows of one size."""
    lengths = find_modality(modality).tensor_half.count_units(dict(tensors))
    if lengths is None or lengths.device.type == "cpu":
        return None if lengths is None else lengths.numpy()
    longest = tensors[find_modality(modality).batch[0]].shape[1]
    return np.full(len(lengths), longest)


def measure_peak_memory(device: torch.device) -> dict[str, float]:
    """Return the peak memory of this process so far, in GB (1e9 bytes).

    Args:
        device: device of the training, such as ``cuda:0``.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts KiB, macOS bytes.
    values = {
        "training/peak_host_memory_gb": peak * (1 if sys.platform == "darwin" else 1024) / 1e9
    }
    if device.type == "cuda":
        allocated = torch.cuda.max_memory_allocated(device)
        values["training/peak_device_memory_gb"] = allocated / 1e9
    return values


class GaugePublisher:
    """Publisher of metrics through ``ray.util.metrics``, in a process that is part of a Ray.

    The gauge of ``training/steps_per_second`` is ``skillnet_training_steps_per_second``, with the
    run's name as the tag ``run``. Ray exports it for Prometheus.

    Args:
        run: name of the run.
    """

    def __init__(self, run: str) -> None:
        self._run, self._gauges = run, dict[str, Any]()

    def publish(self, values: Mapping[str, float]) -> None:
        """Set the gauges of the training's own metrics; without Ray nothing happens."""
        ray = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():
            return
        from ray.util.metrics import Gauge

        for name, value in values.items():
            if not name.startswith(_PREFIX):
                continue
            if name not in self._gauges:
                words = re.sub(r"[^a-z0-9]+", "_", name.lower())
                self._gauges[name] = Gauge(f"skillnet_{words}", name, ("run",))
            self._gauges[name].set(value, {"run": self._run})


class StepProfiler(contextlib.AbstractContextManager["StepProfiler"]):
    """Recorder of a profile of some steps of a training, inside a block.

    The trace is ``profiles/step-<start>-rank-<rank>.json.gz`` in the run's folder. Perfetto and
    ``chrome://tracing`` show it.

    Args:
        settings: first of the recorded steps.
        folder: directory of the run; without one there is no profile.
        rank: number of this process.
        device: place of the tensors of the training.
    """

    def __init__(
        self, settings: TrainingConfig, folder: Path | None, rank: int, device: torch.device
    ) -> None:
        start = settings.profile_start
        is_wanted = start is not None and folder is not None
        self._steps = range(start or 0, (start or 0) + PROFILED_STEPS * is_wanted)
        name = f"step-{start or 0:08d}-rank-{rank}.json.gz"
        self._path = (folder or Path()) / PROFILES / name
        self._activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            self._activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile: torch.profiler.profile | None = None

    def begin_step(self, step: int) -> None:
        """Start before the first step, write the trace after the last one.

        Args:
            step: steps done.
        """
        if step not in self._steps:
            self.__exit__()
        elif self._profile is None:
            self._profile = torch.profiler.profile(activities=self._activities)
            self._profile.start()

    def __exit__(self, *error: object) -> None:
        """Write the trace if one was begun."""
        if self._profile is None:
            return
        self._profile.stop()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self._path))
        self._profile = None


class ThroughputMeter:
    """Counter of rows, waiting time and losses of a training loop.

    Args:
        config: settings of the run.
        groups: ranks that compute different tasks.
        device: device of the losses, such as ``cuda:0``.
        costs: counts tokens and operations; None leaves them out.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        groups: TaskGroups,
        device: torch.device,
        costs: CostMeter | None = None,
    ) -> None:
        self._groups, self._device, self._costs = groups, device, costs
        self._sizes = {name: task.batch_size for name, task in config.tasks.items()}
        self._index = {name: number for number, name in enumerate(config.tasks)}
        self._start = self._mark = time.monotonic()
        self._pause = 0.0
        self.rows = 0
        self.waited = 0.0
        self.losses: dict[str, float] = {}
        self._since = {"rows": 0, "waited": 0.0, "steps": 0}
        self._sums = torch.zeros(len(self._index), 2, dtype=torch.float64, device=device)
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

    def add_batch(self, batch: Batch, loss: Tensor, is_finite: Tensor) -> None:
        """Count a batch of a step, without reading a tensor of the device.

        Args:
            batch: rows of this rank.
            loss: this rank's share of the global loss.
            is_finite: scalar bool; the gradient of the step was finite.
        """
        index = self._index[batch.task]
        # One loss that is not finite would make the running mean NaN for the rest of the run.
        self._sums[index, 0] += loss.masked_fill(~is_finite, 0)
        self._sums[index, 1] += is_finite
        if self._costs is not None:
            self._costs.add(batch)

    def end_step(self, tasks: Iterable[str], norm: Tensor, lr: float) -> None:
        """Count a step after its batches.

        Args:
            tasks: names of those of all ranks, one for each lane.
            norm: length of the gradient over all parameters, a scalar.
            lr: learning rate.
        """
        rows = sum(self._sizes[task] for task in tasks)
        self.rows += rows
        self._since["rows"] += rows
        self._since["steps"] += 1
        self._norm, self._lr = norm, lr

    def collect_metrics(self) -> dict[str, float]:
        """Return metrics since the last call. All ranks must call it together."""
        groups, tokens = self._groups, None
        sums = self._sums.clone()
        if groups.count * groups.world > 1:
            # Each rank of a group has a share of each loss, but counts every step.
            dist.all_reduce(sums)
            sums[:, 1] /= groups.world
        if groups.count > 1 and self._costs is not None:
            counted = torch.tensor(self._costs.tokens / groups.world, device=self._device)
            dist.all_reduce(counted)
            tokens = float(counted)
        now = time.monotonic()
        seconds = max(now - self._mark, 1e-9)
        values: dict[str, float] = {}
        for name, (total, count) in zip(self._index, sums.tolist(), strict=True):
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
            values |= self._costs.collect_metrics(seconds, tokens)
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
