"""The training loop: one task a step, the same code in this process, under Ray and in tests."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.shards import Corpus, open_corpus
from pipelines.stream import Batch, MixedStream, Prefetcher
from pipelines.training import checkpoints
from pipelines.training.gradient_sync import Gather, GradientSync
from pipelines.training.mixture import generator
from pipelines.training.optimizer import (
    SkillAdamW,
    WeightAverage,
    clip_by_norm,
    learning_rate,
)
from pipelines.training.precision import Precision, choose
from pipelines.training.settings import FinetuneConfig
from skillnet import objectives
from skillnet.model import SkillNet
from skillnet.objectives import Gather as Collect
from skillnet.skills import Task
from skillnet_platform import config as configuration
from skillnet_platform import storage
from skillnet_platform.errors import UserError

#: Steps in a row with a loss or gradient that is not finite before training gives up.
PATIENCE = 10


class Reporter:
    """What the loop tells on rank 0. This one keeps silent; others override what they need."""

    def metrics(self, values: dict[str, float], step: int) -> None:
        """Numbers for the record, named ``task/what``."""

    def progress(self, step: int, words: str) -> None:
        """``step`` steps are done."""

    def evaluate(self, model: SkillNet, step: int) -> None:
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
        seconds: time in the loop.
        rows_per_second: training rows over that time.
        waiting: share of that time spent waiting for data.
        bytes_reduced: gradient bytes that this rank put on the wire.
        skipped: steps left out because a gradient was not finite.
        losses: last running mean of the loss per task.
        checkpoint: the last checkpoint, if a run directory was given.
    """

    model: SkillNet
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
        reporter: told about metrics and progress on rank 0.
        stop_at: end before this step as if interrupted, with a checkpoint.

    Raises:
        UserError: corpora, tasks or checkpoints that do not fit.
        FloatingPointError: the loss stays not finite.
    """
    settings = config.training
    reporter = reporter if reporter is not None and rank == 0 else Reporter()
    device = pick_device(settings.use_gpu)
    precision = choose(settings.precision, device)
    if settings.threads_per_worker:
        torch.set_num_threads(settings.threads_per_worker)

    stream = open_stream(config)
    model = build_model(config).to(device, precision.weights)
    if world > 1:
        for parameter in model.parameters():
            dist.broadcast(parameter.data, src=0)
    forward: Callable[..., dict[str, Tensor]] = (
        torch.compile(model, dynamic=True) if settings.compile else model
    )
    optimizer = SkillAdamW(settings.weight_decay, (settings.beta1, settings.beta2))
    average = WeightAverage(settings.ema) if settings.ema else None
    active = {name: list(model.active_parameters(name)) for name in config.tasks}
    sync = GradientSync(active, world, settings.bucket_mb * 2**20)

    identity = configuration.digest(identity_of(config))
    start = resume(run, identity, model, optimizer, average) if run else 0
    last = min(settings.steps, stop_at if stop_at is not None else settings.steps)
    meter = _Meter(config, start, world, device)
    stopped, path, failed = None, None, 0
    step = start

    def keep() -> Path | None:
        if run is None:
            return None
        folder = run / "checkpoints"
        written = None
        if rank == 0:
            state = {"seed": config.seed, "steps": settings.steps, "config_digest": identity}
            written = checkpoints.save(
                folder, step, model, optimizer, average, state, settings.keep
            )
            reporter.checkpoint(written, step)
        return written

    model.train()
    with Prefetcher(stream, start, last, rank, world, pin=device.type == "cuda") as prefetcher:
        for batch in meter.timed(prefetcher):
            batch = batch.to(device, precision.weights)
            task = config.model.tasks[batch.task]
            lr = learning_rate(settings, step)
            seed_dropout(config.seed, step, rank)

            sync.begin(batch.task)
            loss = step_loss(forward, task, batch, precision, config, rank, world)
            loss.backward()
            sync.finish()
            norm = clip_by_norm(active[batch.task], settings.clip)
            if torch.isfinite(norm):
                optimizer.step(active[batch.task], lr)
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
            for _, parameter in active[batch.task]:
                parameter.grad = None

            step += 1
            meter.add(batch, loss.detach(), norm, lr, skipped=failed > 0)
            if step % settings.log_every == 0 or step == last:
                values = meter.values(step)
                reporter.metrics(values, step)
                reporter.progress(step, meter.words())
                if settings.minutes and meter.agree(meter.elapsed > 60 * settings.minutes):
                    stopped = f"training.minutes {settings.minutes} were over at step {step}"
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
    )


def step_loss(
    forward: Callable[..., dict[str, Tensor]],
    task: Task,
    batch: Batch,
    precision: Precision,
    config: FinetuneConfig,
    rank: int = 0,
    world: int = 1,
) -> Tensor:
    """This rank's share of the loss of a global batch: the ranks' losses add up to it."""
    with precision.autocast():
        outputs = forward(batch.task, batch.towers)
    gather = Gather(batch.global_rows, rank, world) if world > 1 else None
    smoothing = config.tasks[batch.task].smoothing
    return task_loss(task, outputs, batch, gather, smoothing)


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
        return objectives.cross_entropy(
            outputs["logits"][real], targets["labels"][real], count, smoothing
        )
    if task.objective == "ctc":
        loss = objectives.ctc(
            outputs["log_probs"],
            outputs["lengths"],
            targets["symbols"],
            targets["symbol_lengths"],
            count,
        )
        # CTC takes no batch of zero rows.
        return loss * 0 if batch.ghost else loss
    return objectives.info_nce(
        outputs["query"][real],
        outputs["candidate"][real],
        outputs["scale"],
        targets["groups"][real],
        count,
        gather,
    )


def open_stream(config: FinetuneConfig) -> MixedStream:
    """The mixed stream over the corpora that the tasks name.

    Raises:
        UserError: a corpus that is missing or does not fit its task.
    """
    corpora = open_corpora(config)
    return MixedStream(
        corpora,
        config.tasks,
        config.model,
        config.seed,
        config.training.augment,
        config.training.temperature,
    )


def open_corpora(config: FinetuneConfig) -> dict[str, Corpus]:
    """Corpus name -> opened corpus, of all tasks; their vocabularies must fit the model's."""
    folder = Path(config.data) if config.data else storage.data_root()
    corpora = {
        name: open_corpus(folder / name)
        for name in sorted({settings.corpus for settings in config.tasks.values()})
    }
    for name, corpus in corpora.items():
        size = (corpus.manifest.get("tokenizer") or {}).get("vocab_size", 0)
        if size > config.model.vocab_size:
            raise UserError(
                f"corpus {name} was prepared with a vocabulary of {size} tokens, "
                f"model.vocab_size is {config.model.vocab_size}; set it to {size} or more"
            )
    return corpora


def build_model(config: FinetuneConfig) -> SkillNet:
    """A model of the configuration's shape: random, keyed by the seed, or from ``init_from``."""
    torch.manual_seed(config.seed)
    model = SkillNet(config.model)
    if config.init_from:
        checkpoints.load_weights(Path(config.init_from), model)
    return model


def resume(
    run: Path,
    identity: str,
    model: SkillNet,
    optimizer: SkillAdamW,
    average: WeightAverage | None,
) -> int:
    """Take up the newest whole checkpoint of a run; the number of steps that it had done.

    Raises:
        UserError: the checkpoint is of a run with another configuration.
    """
    found = checkpoints.newest(run / "checkpoints")
    if found is None:
        return 0
    if found.state["config_digest"] != identity:
        raise UserError(
            f"{found.path} was written with another configuration than this one; go on with that "
            f"one ({run / 'config.yaml'}), or give this run another name"
        )
    checkpoints.load(found, model, optimizer, average)
    return found.step


def identity_of(config: FinetuneConfig) -> dict[str, Any]:
    """What decides the weights: the configuration without names, places and rhythm."""
    training = asdict(config.training)
    for key in (
        "minutes",
        "workers",
        "threads_per_worker",
        "use_gpu",
        "precision",
        "compile",
        "checkpoint_every",
        "keep",
        "evaluate_every",
        "log_every",
        "bucket_mb",
        "max_failures",
    ):
        training.pop(key)
    return {
        "seed": config.seed,
        "init_from": config.init_from,
        "model": configuration.to_dict(config.model),
        "tasks": configuration.to_dict(config.tasks),
        "training": training,
    }


def pick_device(use_gpu: bool) -> torch.device:
    """The device of this worker.

    Raises:
        UserError: a GPU is asked for and there is none.
    """
    if not use_gpu:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("training.use_gpu is true, but torch finds no GPU on this machine")
    return torch.device("cuda", torch.cuda.current_device())


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Dropout hangs on (seed, step, rank) alone, not on what was drawn before."""
    torch.manual_seed(int(generator(seed, "dropout", step, rank).integers(2**62)))


@contextlib.contextmanager
def averaged(model: SkillNet, average: WeightAverage | None) -> Iterator[None]:
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


class _Meter:
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
        self._last: dict[str, tuple[Tensor, float]] = {}
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
