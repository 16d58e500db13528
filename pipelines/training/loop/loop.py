"""The training loop: one task per step, the same code without Ray, under Ray and in tests."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from pipelines.data.shards import row_threads
from pipelines.training.evaluation.tables import compute_overall_score
from pipelines.training.loading.dataloader import prefetch_batches
from pipelines.training.loop import checkpointing, preemption
from pipelines.training.loop.compilation import compile_layers
from pipelines.training.loop.optimizer import (
    BestWeights,
    WeightAverage,
    build_optimizer,
    set_learning_rate,
    update_weights,
)
from pipelines.training.loop.reporter import LoopCallback, LoopReporter
from pipelines.training.loop.residency import WeightResidency
from pipelines.training.loop.resolved_run import ResolvedRun
from pipelines.training.loop.setup import (
    TrainingReplica,
    build_replica,
    find_checkpoint,
    find_used_files,
    pick_device,
)
from pipelines.training.loop.step import backward_step
from pipelines.training.loop.task_groups import TaskGroups
from pipelines.training.loop.task_health import MAX_NONFINITE_STEPS, TaskHealth
from pipelines.training.loop.telemetry import (
    CostMeter,
    GaugePublisher,
    StepProfiler,
    ThroughputMeter,
    find_peak_flops,
)
from skillnet.keyed_random import keyed_rng
from skillnet.multitask_model import TaskModel
from skillnet.precision import choose_precision

if TYPE_CHECKING:
    from pipelines.training.loop.checkpointing import BackgroundCheckpoints
    from pipelines.training.loop.sharded_checkpoints import ShardedCheckpoints
    from pipelines.training.loop.sharding import ModelShards


@dataclass
class TrainResult:
    """Result of a training loop.

    Args:
        model: with the averaged weights if the run keeps an average, and with those of the best
            validation if it has a patience.
        step: steps done.
        resumed: step of the checkpoint that this call resumed from; 0 for a fresh start.
        stopped_early: why training ended before its last step, or None.
        seconds: time in the loop, without evaluations.
        rows_per_second: training rows over that time.
        waiting: fraction of that time spent waiting for data.
        bytes_reduced: gradient bytes that this rank sent.
        tasks: steps and rows per task, and those that made no update.
        precision: number format of the products: ``bf16``, ``fp32`` or ``fp64``.
        losses: last running mean of the loss per task.
        checkpoint: the last checkpoint on rank 0, if the run has a folder.
        shards: this rank's part of the weights; None if the model holds them whole.
        preempted: a stop was requested (:mod:`pipelines.training.loop.preemption`); a checkpoint
            exists.
        has_converged: the run's patience ended it, so it is finished before its last step.
        best_step: steps of the best validation, whose weights the model has; None without a
            patience.
    """

    model: TaskModel
    step: int
    resumed: int
    stopped_early: str | None
    seconds: float
    rows_per_second: float
    waiting: float
    bytes_reduced: int
    tasks: dict[str, dict[str, Any]]
    precision: str
    losses: dict[str, float] = field(default_factory=dict)
    checkpoint: Path | None = None
    shards: "ModelShards | None" = None
    preempted: bool = False
    has_converged: bool = False
    best_step: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the weights, as plain types."""
        values = {k: value for k, value in vars(self).items() if k not in ("model", "shards")}
        return values | {"checkpoint": str(self.checkpoint) if self.checkpoint else None}


def train_model(
    run: ResolvedRun,
    *,
    rank: int = 0,
    world: int = 1,
    reporter: LoopReporter | None = None,
    stop_at: int | None = None,
    callbacks: Sequence[LoopCallback] = (),
) -> TrainResult:
    """Train the tasks of a configuration jointly.

    Args:
        run: configuration and inputs. With a folder, checkpoints are written there, and training
            resumes from the newest valid one.
        rank: this process among ``world``; with several, ``torch.distributed`` is initialised.
        world: number of processes.
        reporter: receives metrics, progress and checkpoints.
        stop_at: end before this step as if interrupted, with a checkpoint.
        callbacks: called at the start and before each step.

    Raises:
        UserError: corpora, tasks or checkpoints do not fit.
        NonFiniteGradientError: too many gradients of a task are not finite.
    """
    config = run.config
    settings = config.training
    reporter = reporter or LoopReporter()
    device = pick_device(settings.use_gpu)
    precision = choose_precision(settings.precision, device)
    if settings.threads_per_worker:
        torch.set_num_threads(settings.threads_per_worker)
    row_threads.limit_row_threads(torch.get_num_threads())

    identity = run.identity_digest
    folder = run.folder if run.has_folder else None
    checkpoint = None
    if folder is not None:
        # The checkpoint must have the same identity as this run.
        checkpoint = find_checkpoint(folder, identity, world, find_used_files(config))
    groups = TaskGroups(run.dataloader.lanes, rank, world, settings.collective_timeout_s)
    replica = build_replica(
        config,
        run.corpora,
        rank,
        world,
        precision,
        folder,
        checkpoint,
        run.parts.model,
        groups,
    )
    model, active, sync, shards = replica.model, replica.active, replica.sync, replica.shards
    if settings.compile:
        stepping = model if shards is None else shards.runner.model
        compile_layers(config, stepping, model, precision, groups.rank, groups.world)
    # Weights that no step changes have no place in the optimizer.
    trained = dict(chain.from_iterable(active.values()))
    optimizer = build_optimizer(trained.items(), settings)
    average = WeightAverage(settings.ema) if settings.ema else None
    best = BestWeights(settings.patience) if settings.patience else None

    health = TaskHealth(
        config.tasks,
        f"lower training.lr ({settings.lr}) or training.max_grad_norm, or set training.precision "
        "fp32",
        world,
        device,
    )
    start = 0
    if checkpoint is not None:
        left_out = trained.keys() - replica.held
        checkpointing.load_checkpoint(checkpoint, model, optimizer, average, shards, best, left_out)
        start = checkpoint.step
        sizes = {name: task.batch_size for name, task in config.trained.items()}
        health.restore(checkpoint.state, run.dataloader.count_steps(start), sizes)
    tensors = checkpointing.CheckpointTensors(model, optimizer, average, shards, best)
    # Tensors that move between devices, or are gathered, do not count their changes.
    unchanged = None
    if settings.sharding in ("none", "host"):
        moves = settings.sharding == "host" or groups.count > 1
        unchanged = checkpointing.UnchangedFiles(replica.source, model.unread, moves)
        if checkpoint is not None and not moves:
            unchanged.resume(checkpoint.path, tensors)
    residency = None
    if settings.sharding == "host":
        residency = WeightResidency(model, optimizer, average, device, config.tasks)
    # One schedule per task: a task may have a rate of its own.
    schedules = {n: replace(settings, lr=t.lr or settings.lr) for n, t in config.trained.items()}
    # ``stop_at`` ends the loop early, but the learning rate follows ``settings.steps``.
    last = min(settings.steps, stop_at if stop_at is not None else settings.steps)
    if best is not None and best.is_over:
        last = start
    peak = find_peak_flops(device, precision.name == "bf16")
    meter = ThroughputMeter(config, groups, device, CostMeter(model, peak))
    gauges = GaugePublisher(str(config.name))
    stopped, path, leaving = None, None, False
    step, lanes = start, settings.tasks_per_step
    writer: ShardedCheckpoints | BackgroundCheckpoints | None = None
    if run.has_folder and shards is not None:
        from pipelines.training.loop.sharded_checkpoints import open_writer

        writer = open_writer(run.folder / "checkpoints", tensors, rank, settings, reporter)
    elif run.has_folder and not rank and checkpointing.writes_beside_training(device):
        writer = checkpointing.BackgroundCheckpoints(
            run.folder / "checkpoints",
            tensors,
            settings.keep_checkpoints,
            unchanged or checkpointing.UnchangedFiles(only_unread=True),
            reporter.checkpoint,
        )

    def save_checkpoint() -> Path | None:
        health.reduce()
        if not run.has_folder:
            return None
        with replica.placed.joined(optimizer, average):
            return write_state()

    def write_state() -> Path | None:
        if rank and shards is None:
            return None
        if residency is not None:
            residency.settle()
        state: dict[str, Any] = {}
        if not rank:
            # The report loads the initial weights once more, so it is made only if it matters.
            if health.has_idle_task and run.init_report is not None:
                health.mark_inherited(run.init_report.trained_tasks)
            state = {"seed": config.seed, "steps": settings.steps, "config_digest": identity}
            state |= health.checkpoint_state()
        if writer is not None:
            writer.start(step, state)
            return None
        if rank and shards is not None:
            tensors.join()
            return None
        written = checkpointing.write_checkpoint(
            run.folder / "checkpoints", step, tensors, state, settings.keep_checkpoints, unchanged
        )
        reporter.checkpoint(written, step)
        return written

    reporter.start(start)
    for callback in callbacks:
        callback.on_train_start(folder, rank)
    replica.runner.train()
    processes, pin = settings.dataloader_num_workers, device.type == "cuda"
    with (
        StepProfiler(settings, folder, rank, device) as profiler,
        prefetch_batches(
            run.dataloader, start, last, groups.rank, groups.world, processes, pin, groups.lanes
        ) as batches,
    ):
        # As many batches as this rank has lanes.
        for loaded in zip(*[meter.iter_timed(batches)] * len(groups.lanes), strict=True):
            own = [batch.to(device, precision.weights) for batch in loaded]
            tasks, losses = run.dataloader.tasks_at(step), []
            if residency is not None:
                following = run.dataloader.tasks_at(step + 1)[0] if step + 1 < last else None
                residency.begin_step(tasks[0], following)
            for callback in callbacks:
                callback.on_step_start(step)
            profiler.begin_step(step)

            # Ranks sum gradients during the backward pass; the stop flag travels with them.
            sync.begin(own[-1].task, preemption.stop_requested(), tasks)
            for lane, batch in zip(groups.lanes, own, strict=True):
                # Dropout is reseeded each step, so that a resumed run repeats the same numbers.
                seed_dropout(config.seed, step * lanes + lane, groups.rank)
                with sync.paused(batch is not own[-1]):
                    loss = backward_step(
                        replica.runner,
                        batch,
                        precision,
                        config,
                        sync,
                        groups.rank,
                        groups.world,
                        health,
                        run.parts.losses,
                        groups.find_channel(),
                    )
                losses.append(loss)
            leaving = sync.finish()
            # All ranks see the same norm, so all of them skip the same steps. Norm and flag stay on
            # the device until the next log.
            lr = set_learning_rate(optimizer, schedules[tasks[0]], step)
            norm, is_finite = update_weights(
                optimizer,
                replica.list_active(set(tasks)),
                # AdamW does not see a constant factor, so the sum stands for the mean.
                settings.max_grad_norm * lanes,
                average,
                replica.shard_group,
                sync.norm,
            )
            for task in tasks:
                health.add_step(task, config.tasks[task].batch_size, is_finite, step)
            step += 1
            for batch, loss in zip(own, losses, strict=True):
                meter.add_batch(batch, loss, is_finite)
            meter.end_step(tasks, norm if lanes == 1 else norm / lanes, lr)
            if step % settings.log_every == 0 or step == last or leaving:
                health.reduce()
                values = (
                    meter.collect_metrics() | replica.runner.statistics() | health.collect_metrics()
                )
                reporter.metrics(values, step)
                if rank == 0:
                    gauges.publish(values)
                reporter.progress(step, meter.format_losses() + health.format_problems())
                health.check_trained(MAX_NONFINITE_STEPS)
            # All ranks read the same flag from the last bucket, so all stop after this step.
            if leaving and step < last:
                stopped = f"preempted at step {step}"
                break
            if reporter.needs_evaluation(step, last, settings):
                with averaged_weights(replica, average, residency), meter.paused():
                    rows = reporter.evaluate(model, step)
                    if best is not None:
                        best.add_validation(trained, share_score(rows or [], world, device), step)
                if best is not None and best.is_over:
                    break
            # The checkpoint of the last step is written below.
            if stopped or step == last:
                break
            if settings.checkpoint_every and step % settings.checkpoint_every == 0:
                path = save_checkpoint()

    if step > start or path is None:
        path = save_checkpoint()
    if writer is not None:
        path = writer.close()
    # No rank may end while rank 0 still writes the checkpoint.
    if world > 1:
        dist.barrier()
    has_converged = best is not None and best.is_over
    if step == settings.steps or has_converged:
        health.check_trained()
    if residency is not None:
        residency.settle()
    # The result has the averaged weights, or the best ones; the checkpoint has all of them.
    if average is not None:
        average.swap(replica.owner)
    replica.placed.share_weights()
    if best is not None:
        best.restore(trained)
        stopped = best.describe_end() if has_converged and step < settings.steps else stopped
    if residency is not None:
        residency.drop_state()
    if stopped is None and last < settings.steps:
        stopped = f"stopped at step {last}, as requested"
    return TrainResult(
        model=model.eval(),
        step=step,
        resumed=start,
        stopped_early=stopped,
        seconds=meter.elapsed,
        rows_per_second=meter.rows / max(meter.elapsed, 1e-9),
        waiting=meter.waited / max(meter.elapsed, 1e-9),
        bytes_reduced=sync.bytes_reduced,
        tasks=health.to_dict(),
        losses=dict(meter.losses),
        precision=precision.name,
        checkpoint=path,
        shards=shards,
        preempted=leaving and step < settings.steps,
        has_converged=has_converged,
        best_step=None if best is None else best.step,
    )


def share_score(rows: list[dict[str, Any]], world: int, device: torch.device) -> float:
    """Return the score of a validation, equal on all ranks; NaN without one.

    Args:
        rows: tidy rows on the first rank.
        world: number of ranks.
        device: that collectives use.
    """
    score, _ = compute_overall_score(rows, "validation")
    shared = torch.tensor(math.nan if score is None else score, dtype=torch.float64, device=device)
    if world > 1:
        dist.broadcast(shared, src=0)
    return float(shared)


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Seed dropout by (seed, step, rank), so that it does not depend on earlier draws."""
    torch.manual_seed(int(keyed_rng(seed, "dropout", step, rank).integers(2**62)))


@contextlib.contextmanager
def averaged_weights(
    replica: TrainingReplica,
    average: WeightAverage | None,
    residency: WeightResidency | None = None,
) -> Iterator[None]:
    """Swap the averaged weights into the model, in evaluation mode, inside a block."""

    def swap() -> None:
        if residency is not None:
            residency.settle()
        if average is not None:
            average.swap(replica.owner)

    swap()
    replica.placed.share_weights()
    replica.model.eval()
    try:
        yield
    finally:
        replica.runner.train()
        swap()
