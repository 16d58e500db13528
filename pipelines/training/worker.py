"""What each worker of a run does, with and without Ray, and how it tells the driver.

Rank 0 writes metrics to MLflow by run id, and each line of progress to ``progress.jsonl`` in the
run's folder, which the driver follows: so the driver shows the same with any number of workers.
"""

import contextlib
import functools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from pipelines.mirror import TRAINED, mirror_of
from pipelines.training import faults, notice
from pipelines.training.loop import Reporter, train
from pipelines.training.progress import PROGRESS, ProgressFile
from pipelines.training.settings import FinetuneConfig
from pipelines.uploads import Uploads, bring, fit_storage, send_trained
from skillnet.growth import remove_task
from skillnet.malloc import KEEP_FREED_MEMORY
from skillnet.multitask_model import TaskModel
from skillnet_platform import config as configuration
from skillnet_platform import console
from skillnet_platform.errors import Terminated
from skillnet_platform.storage import write_json
from skillnet_platform.tracking import Tracker

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

MODEL = "model"

#: Seconds that a worker whose spool the driver does not see waits for the tracker at its end.
TRACKER_PATIENCE_S = 60.0
#: So often a worker whose progress file the driver does not see says how far it is.
ALOUD_S = 10.0

#: Numbers of the fits of this process, for their names.
_FITS = count()

#: Called with the tidy rows of an evaluation during training, and the step.
OnEvaluation = Callable[[list[dict[str, Any]], int], None]

#: Threads of a worker that wait do not spin: the one that makes the batches needs the core.
WORKER_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", **KEEP_FREED_MEMORY}


@dataclass
class Nested:
    """How a fit on Ray runs inside a trial of Ray Tune.

    Args:
        resources: of one worker, such as ``{"CPU": 1}``.
        callbacks: of Ray Train, such as the one that passes reports on to Tune.
    """

    resources: dict[str, float]
    callbacks: list[Any]


class RunReporter(Reporter):
    """Writes metrics to MLflow and to the run's progress file.

    Args:
        config: of the run, with absolute paths.
        run: folder of the run.
        tracker: of the run, or none.
        on_evaluation: told about each evaluation, or none.
        uploads: sends checkpoints to a store, or none.
        world: number of workers; recorded where it may change.
        aloud: the driver does not see the progress file: say now and then how far it is. Ray
            passes on what workers say.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        run: Path,
        tracker: Tracker | None,
        on_evaluation: OnEvaluation | None = None,
        uploads: Uploads | None = None,
        world: int = 1,
        aloud: bool = False,
    ) -> None:
        self._uploads, self._world = uploads, world
        self._next_words = time.monotonic() if aloud else float("inf")
        self._config, self._run, self._tracker = config, run, tracker
        self._on_evaluation = on_evaluation
        self._file = ProgressFile(run / PROGRESS)

    def start(self, step: int) -> None:
        self.progress(step, "")
        if self._config.training.min_workers:
            self.metrics({"training/workers": self._world}, step)

    def metrics(self, values: dict[str, float], step: int) -> None:
        self._file.say(step=step, metrics=values)
        if self._tracker is not None:
            self._tracker.metrics(values, step)

    def progress(self, step: int, words: str) -> None:
        self._file.say(step=step, words=words)
        if time.monotonic() >= self._next_words:
            self._next_words = time.monotonic() + ALOUD_S
            said = f", {words}" if words else ""
            console.note(f"training: step {step} of {self._config.training.steps}{said}")

    def evaluate(self, model: TaskModel, step: int) -> None:
        from pipelines import reconstructions
        from pipelines.evaluation import evaluate_model
        from pipelines.reporting import flat_metrics

        tasks = self._config.measured
        rows = evaluate_model(
            model,
            str(self._config.data),
            list(tasks),
            ["validation"],
            seed=self._config.seed,
            corpora={name: task.corpus for name, task in tasks.items()},
            limits={name: task.max_length for name, task in tasks.items()},
            precision=self._config.training.precision,
            samples=0,
            masks=self._config.training.masking,
        )
        self.metrics(flat_metrics(rows), step)
        reconstructions.record(self._config, model, self._run, self._tracker, step)
        if self._on_evaluation is not None:
            self._on_evaluation(rows, step)

    def checkpoint(self, path: Path, step: int) -> None:
        if self._uploads is not None:
            self._uploads.checkpoint(path)

    def close(self) -> None:
        """Send what waits and close the file."""
        if self._tracker is not None:
            self._tracker.flush()
        self._file.close()


class _Others(Reporter):
    """Ranks but the first: they only take part in what all ranks do after an evaluation."""

    def __init__(self, on_evaluation: OnEvaluation | None) -> None:
        self._on_evaluation = on_evaluation

    def evaluate(self, model: TaskModel, step: int) -> None:
        if self._on_evaluation is not None:
            self._on_evaluation([], step)


def work(
    config: FinetuneConfig,
    run: Path,
    rank: int = 0,
    world: int = 1,
    tracked: tuple[str, str] | None = None,
    on_evaluation: OnEvaluation | None = None,
    apart: bool = False,
    host: str | None = None,
) -> None:
    """Train as one of ``world`` workers; rank 0 leaves the model and a summary in the run.

    Args:
        config: of the run, with absolute paths.
        run: folder of the run.
        rank: this worker.
        world: number of workers.
        tracked: MLflow run id and URI.
        on_evaluation: called after each evaluation: with its rows on rank 0, with none elsewhere.
        apart: the driver does not see this worker's disk: rank 0 sends it the final model
            through the run's mirror.
        host: id of this worker's host in an elastic run; none in others.

    Raises:
        Regroup: the workers of an elastic run left to start again, with a checkpoint.
    """
    mirror = mirror_of(config, run)
    if mirror is not None:
        bring(mirror)
    if rank:
        done = train(config, rank=rank, world=world, run=run, reporter=_Others(on_evaluation))
        if done.left and host is not None:
            _regroup(world, host)
        return
    tracker = Tracker.by_id(*tracked) if tracked else None
    uploads = Uploads(mirror, config.training.keep) if mirror is not None else None
    aloud = apart and mirror is not None
    reporter = RunReporter(config, run, tracker, on_evaluation, uploads, world, aloud)
    try:
        done = train(config, rank=rank, world=world, run=run, reporter=reporter)
        if done.left and host is not None:
            if uploads is not None:
                uploads.close(config.storage.patience)
            _regroup(world, host)
        if not done.left:
            for name in config.tasks.keys() - config.measured.keys():
                remove_task(done.model, name)
            done.model.save_pretrained(run / MODEL)
        write_json(run / TRAINED, done.summary() | {"world": world, "seed": config.seed})
    finally:
        reporter.close()
    if aloud and tracker is not None:
        tracker.settle(TRACKER_PATIENCE_S)
    if mirror is not None and uploads is not None:
        send_trained(mirror, uploads, config.storage.patience, apart)


def _regroup(world: int, host: str) -> None:
    """End this worker together with the others, unless it was the driver who asked.

    Raises:
        Regroup: the same on all of them.
    """
    mine = (notice.ordered(), host if notice.signalled() else None)
    each: list[Any] = [mine] * world
    if world > 1:
        dist.all_gather_object(each, mine)
    if not any(ordered for ordered, _ in each):
        raise notice.Regroup(sorted({left for _, left in each if left is not None}))


def ray_worker(settings: dict[str, Any]) -> None:
    """Ray Train's loop function: takes plain values, so that any worker can read them."""
    import ray.train

    config = configuration.build(FinetuneConfig, settings["config"])
    context = ray.train.get_context()
    torch.set_num_threads(settings["threads"])
    if config.training.use_gpu:
        from ray.train.torch import get_device

        torch.cuda.set_device(get_device())
    node = ray.get_runtime_context().get_node_id()
    tracked, run, rank = settings["tracked"], Path(settings["run"]), context.get_world_rank()
    with notice.looking_for(settings["leave"]) if rank == 0 else contextlib.nullcontext():
        work(
            config,
            run,
            rank,
            context.get_world_size(),
            (tracked[0], tracked[1]) if tracked else None,
            settings["on_evaluation"],
            apart=settings["driver_node"] != node,
            host=node if config.training.min_workers else None,
        )


def fit_on_ray(
    config: FinetuneConfig,
    run: Path,
    tracked: tuple[str, str] | None,
    on_evaluation: OnEvaluation | None = None,
    nested: Nested | None = None,
) -> None:
    """Train on ``training.workers`` Ray workers.

    A worker that dies takes the others with it; Ray starts them again, up to
    ``training.max_failures`` times, and they go on from the newest whole checkpoint. So often, too,
    a controller that died is started again. A user's mistake, such as a full disk, ends the run.
    With ``training.min_workers`` a host that leaves is no failure:
    :mod:`pipelines.training.elastic`.

    Args:
        config: of the run, with absolute paths.
        run: folder of the run.
        tracked: MLflow run id and URI.
        on_evaluation: see :func:`work`; called in the workers, so it must be picklable.
        nested: how to run inside a trial of Ray Tune.

    Raises:
        Terminated: asked to leave while an elastic run waited for hosts.
    """
    from skillnet_platform import cluster

    workers = config.training.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = config.training.threads_per_worker or max(1, (cores or 1) // workers)
    # It looks out for notices of cloud machines, and logs an error about itself.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    loop = {
        "config": configuration.to_dict(config),
        "run": str(run),
        "threads": threads,
        "tracked": list(tracked) if tracked else None,
        "on_evaluation": on_evaluation,
    }
    with cluster.session(cpus=max(workers, cores or 1)):
        import ray
        from ray.exceptions import RayActorError
        from ray.train import ControllerError

        from pipelines.training.ray_notice import RaySign

        leave = loop["leave"] = RaySign()
        loop["driver_node"] = ray.get_runtime_context().get_node_id()
        for left in range(config.training.max_failures, -1, -1):
            trainer = _trainer(config, run, loop, nested)
            try:
                # Not before Ray is up: it takes the signal for itself.
                with notice.listening(leave):
                    trainer.fit()
                return
            except RayActorError as problem:
                # Not a worker: those are the controller's matter. Its workers end with it.
                if not left:
                    raise
                words = str(problem).strip().splitlines()[0]
                console.warn(f"Ray Train's controller is gone ({words}); starting it again")
            except ControllerError as problem:
                if not isinstance(problem.controller_failure, notice.TooFewHosts):
                    raise
                raise Terminated(
                    "ended by SIGTERM while too few hosts were there to train; the same command, "
                    f"with --name {config.name}, goes on"
                ) from None
            except SystemExit:
                # What Ray Train makes of Ctrl-C would be taken for an ordinary end.
                raise KeyboardInterrupt from None


def _trainer(
    config: FinetuneConfig, run: Path, loop: dict[str, Any], nested: Nested | None
) -> "TorchTrainer":
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig

    from pipelines.training import rendezvous
    from pipelines.training.policies import Trainer
    from pipelines.training.ray_notice import ListenInWorker

    training = config.training
    one = {"CPU": 1.0} | ({"GPU": 1.0} if training.use_gpu else {})
    workers: Any = training.workers
    kind: Any = Trainer
    if training.min_workers:
        from pipelines.training.elastic import ElasticTrainer

        workers = (training.min_workers, training.workers)
        kind = functools.partial(ElasticTrainer, leave=loop["leave"])
    scaling = ScalingConfig(  # type: ignore[call-arg]
        num_workers=workers,
        elastic_resize_monitor_interval_s=training.regrow_seconds,
        use_gpu=training.use_gpu,
        resources_per_worker=nested.resources if nested else one,
        placement_strategy=training.placement.upper(),
    )
    trainer: TorchTrainer = kind(
        ray_worker,
        train_loop_config=loop,
        scaling_config=scaling,
        torch_config=rendezvous.torch_config(training.use_gpu),
        run_config=RunConfig(
            # Our own checkpoints are what a run goes on from: each fit is a new one to Ray.
            name=f"fit-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{next(_FITS)}",
            **fit_storage(config, run),
            logging_config=LoggingConfig(log_level="WARNING"),
            worker_runtime_env={"env_vars": WORKER_ENVIRONMENT | faults.environment()},
            # Ray's type names only what users' callbacks see; it takes those of workers as well.
            callbacks=[
                ListenInWorker(),  # type: ignore[list-item]
                *(nested.callbacks if nested else []),
            ],
            failure_config=FailureConfig(  # type: ignore[call-arg]
                max_failures=training.max_failures, controller_failure_limit=3
            ),
        ),
    )
    return trainer
