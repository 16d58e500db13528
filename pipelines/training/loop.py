"""The training loop: one task a step, the same code in this process, under Ray and in tests."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.config.run import FinetuneConfig
from pipelines.loading.dataloader import Batch, Prefetcher
from pipelines.loading.rng import keyed_rng
from pipelines.runs.identity import identity_of
from pipelines.shards import row_threads
from pipelines.training import checkpointing, fault_injection, preemption
from pipelines.training.freezing import trainable_parameters
from pipelines.training.gradient_sync import Gather, GradientSync
from pipelines.training.optimizer import (
    WeightAverage,
    build_lr_scheduler,
    build_optimizer,
    clip_gradients,
)
from pipelines.training.setup import build_model, open_stream, pick_device, resume
from pipelines.training.throughput import Meter
from skillnet import losses as skillnet_losses
from skillnet.losses import RankGather as Collect
from skillnet.multitask_model import TaskModel
from skillnet.precision import ComputePrecision, choose_precision
from skillnet.skills import Task
from skillnet_platform import config as configuration

#: Steps in a row with a loss or gradient that is not finite before training gives up.
PATIENCE = 10


class Reporter:
    """What the loop tells on rank 0. This one keeps silent; others override what they need."""

    def start(self, step: int) -> None:
        """Training begins after so many steps done before."""

    def metrics(self, values: dict[str, float], step: int) -> None:
        """Numbers for the record, named ``task/what``."""

    def progress(self, step: int, words: str) -> None:
        """``step`` steps are done."""

    def evaluate(self, model: TaskModel, step: int) -> None:
        """Measure the model; the loop goes on when this returns."""

    def checkpoint(self, path: Path, step: int) -> None:
        """A whole checkpoint lies at ``path``."""


@dataclass
class Trained:
    """What a run came to.

    Args:
        model: with the averaged weights if the run kept an average.
        step: steps done.
        resumed: step at which this call took up, 0 for a fresh start.
        stopped_early: why it ended before its last step, or none.
        left: it was asked to leave (:mod:`pipelines.training.preemption`): a checkpoint lies there.
        seconds: time in the loop.
        rows_per_second: training rows over that time.
        waiting: share of that time spent waiting for data.
        bytes_reduced: gradient bytes that this rank put on the wire.
        skipped: steps left out because a gradient was not finite.
        losses: last running mean of the loss per task.
        checkpoint: the last checkpoint, if a run directory was given.
    """

    model: TaskModel
    step: int
    resumed: int
    stopped_early: str | None
    seconds: float
    rows_per_second: float
    waiting: float
    bytes_reduced: int
    skipped: int
    losses: dict[str, float] = field(default_factory=dict)
    checkpoint: Path | None = None
    left: bool = False

    def summary(self) -> dict[str, Any]:
        """Everything but the model, in plain types."""
        values = {key: value for key, value in vars(self).items() if key != "model"}
        return values | {"checkpoint": str(self.checkpoint) if self.checkpoint else None}


def train(
    config: FinetuneConfig,
    *,
    rank: int = 0,
    world: int = 1,
    run: Path | None = None,
    reporter: Reporter | None = None,
    stop_at: int | None = None,
) -> Trained:
    """Train the tasks of a configuration jointly.

    Args:
        config: the run. ``config.data`` holds the prepared corpora.
        rank: this process among ``world``; with several, ``torch.distributed`` is initialised.
        world: number of processes.
        run: directory of the run: checkpoints go there, and the newest whole one is taken up.
            None keeps nothing on disk.
        reporter: told about metrics and progress.
        stop_at: end before this step as if interrupted, with a checkpoint.

    Raises:
        UserError: corpora, tasks or checkpoints that do not fit.
        FloatingPointError: the loss stays not finite.
    """
    settings = config.training
    reporter = reporter or Reporter()
    device = pick_device(settings.use_gpu)
    precision = choose_precision(settings.precision, device)
    if settings.threads_per_worker:
        torch.set_num_threads(settings.threads_per_worker)
    row_threads.limit_row_threads(torch.get_num_threads())

    stream = open_stream(config)
    model = build_model(config).to(device, precision.weights)
    if world > 1:
        for parameter in model.parameters():
            dist.broadcast(parameter.data, src=0)
    optimizer = build_optimizer(model.named_parameters(), settings)
    average = WeightAverage(settings.ema) if settings.ema else None
    active = trainable_parameters(model, config)
    sync = GradientSync(active, world, settings.bucket_mb * 2**20)

    identity = configuration.digest(identity_of(config))
    start = resume(run, identity, model, optimizer, average, world) if run else 0
    scheduler = build_lr_scheduler(optimizer, settings, start)
    last = min(settings.steps, stop_at if stop_at is not None else settings.steps)
    meter = Meter(config, start, world, device)
    stopped, path, failed, leaving = None, None, 0, False
    breaks = fault_injection.ordered(run, rank)
    step = start

    def keep() -> Path | None:
        if run is None:
            return None
        folder = run / "checkpoints"
        written = None
        if rank == 0:
            state = {"seed": config.seed, "steps": settings.steps, "config_digest": identity}
            written = checkpointing.save(
                folder, step, model, optimizer, average, state, settings.keep
            )
            reporter.checkpoint(written, step)
        return written

    reporter.start(start)
    model.train()
    with Prefetcher(stream, start, last, rank, world, pin=device.type == "cuda") as prefetcher:
        for batch in meter.timed(prefetcher):
            batch = batch.to(device, precision.weights)
            task = config.model.tasks[batch.task]
            seed_dropout(config.seed, step, rank)
            if breaks is not None:
                breaks.at(step)

            sync.begin(batch.task, preemption.asked())
            loss = step_loss(model, task, batch, precision, config, rank, world)
            loss.backward()
            leaving = sync.finish()
            norm = clip_gradients((p for _, p in active[batch.task]), settings.clip)
            if torch.isfinite(norm):
                optimizer.step()
                if average is not None:
                    average.update(active[batch.task])
                failed = 0
            else:
                failed += 1
                if failed == PATIENCE:
                    raise FloatingPointError(
                        f"{batch.task}: the gradient is not finite since step {step - failed + 1};"
                        f" lower training.lr ({settings.lr}) or training.clip, or set "
                        "training.precision fp32"
                    )
            optimizer.zero_grad()

            step += 1
            meter.add(batch, loss.detach(), norm, scheduler.get_last_lr()[0], skipped=failed > 0)
            scheduler.step()
            if step % settings.log_every == 0 or step == last or leaving:
                values = meter.values(step) | model.statistics()
                reporter.metrics(values, step)
                reporter.progress(step, meter.words())
                if settings.minutes and meter.agree(meter.elapsed > 60 * settings.minutes):
                    stopped = f"training.minutes {settings.minutes} were over at step {step}"
            if leaving and step < last:
                stopped = f"asked to leave (SIGTERM) at step {step}"
                break
            if settings.evaluate_every and step % settings.evaluate_every == 0 and step < last:
                with averaged(model, average), meter.paused():
                    reporter.evaluate(model, step)
            if stopped or step == last:
                break
            if settings.checkpoint_every and step % settings.checkpoint_every == 0:
                path = keep()

    if step > start or path is None:
        path = keep()
    if world > 1:
        dist.barrier()
    if average is not None:
        average.swap(model)
    if stopped is None and last < settings.steps:
        stopped = f"asked to stop at step {last}"
    return Trained(
        model=model.eval(),
        step=step,
        resumed=start,
        stopped_early=stopped,
        seconds=meter.elapsed,
        rows_per_second=meter.rows / max(meter.elapsed, 1e-9),
        waiting=meter.waited / max(meter.elapsed, 1e-9),
        bytes_reduced=sync.bytes_reduced,
        skipped=meter.skipped,
        losses=dict(meter.losses),
        checkpoint=path,
        left=leaving and step < settings.steps,
    )


def step_loss(
    model: TaskModel,
    task: Task,
    batch: Batch,
    precision: ComputePrecision,
    config: FinetuneConfig,
    rank: int = 0,
    world: int = 1,
) -> Tensor:
    """This rank's share of the loss of a global batch: the ranks' losses add up to it."""
    with precision.autocast():
        outputs = model(batch.task, batch.towers)
    gather = Gather(batch.global_rows, rank, world) if world > 1 else None
    smoothing = config.tasks[batch.task].smoothing
    loss = task_loss(task, outputs, batch, gather, smoothing)
    # What the model adds is a mean over this rank's rows: it counts by their share.
    share = 0.0 if batch.ghost else len(batch.rows) / batch.global_rows
    for extra in model.auxiliary_losses().values():
        loss = loss + share * extra
    return loss


def task_loss(
    task: Task,
    outputs: Mapping[str, Tensor],
    batch: Batch,
    gather: Collect | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    """The objective of a task on the outputs of a rank's rows, divided by the global count."""
    targets, count = batch.targets, batch.global_rows
    real = slice(0, 0) if batch.ghost else slice(None)
    if task.objective == "classification":
        return skillnet_losses.cross_entropy(
            outputs["logits"][real], targets["labels"][real], count, smoothing
        )
    if task.objective == "masked":
        loss = skillnet_losses.masked_loss(
            outputs["predicted"], targets["values"], targets["masked"], count
        )
        return loss * 0 if batch.ghost else loss
    if task.objective == "ctc":
        loss = skillnet_losses.ctc_loss(
            outputs["log_probs"],
            outputs["lengths"],
            targets["symbols"],
            targets["symbol_lengths"],
            count,
        )
        # CTC takes no batch of zero rows.
        return loss * 0 if batch.ghost else loss
    return skillnet_losses.info_nce(
        outputs["query"][real],
        outputs["candidate"][real],
        outputs["scale"],
        targets["groups"][real],
        count,
        gather,
    )


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Dropout hangs on (seed, step, rank) alone, not on what was drawn before."""
    torch.manual_seed(int(keyed_rng(seed, "dropout", step, rank).integers(2**62)))


@contextlib.contextmanager
def averaged(model: TaskModel, average: WeightAverage | None) -> Iterator[None]:
    """The model with its averaged weights, in evaluation mode, for the length of a block."""
    if average is not None:
        average.swap(model)
    model.eval()
    try:
        yield
    finally:
        model.train()
        if average is not None:
            average.swap(model)
