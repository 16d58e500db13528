"""Training on Ray workers: :func:`fit_on_ray` starts them and returns when training ends."""

import contextlib
import functools
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipelines.training.config.run import FinetuneConfig, TrainingConfig
from pipelines.training.loop import preemption
from pipelines.training.loop.ray_train.rendezvous import build_process_group_config
from pipelines.training.loop.reporter import LoopCallback, OnEvaluation
from pipelines.training.loop.resolved_run import ResolvedRun
from pipelines.training.loop.setup import count_threads
from pipelines.training.loop.worker import DeviceLostError, DeviceWatch, FinalEvaluation, run_worker
from pipelines.training.runs.mirror import fit_storage
from skillnet.precision import KEEP_FREED_MEMORY
from skillnet_platform import config as configuration
from skillnet_platform import console
from skillnet_platform.cli import SPIN_COUNT, SPIN_VARIABLE
from skillnet_platform.cluster import capacity
from skillnet_platform.errors import TerminatedError, UserError
from skillnet_platform.ray_internals.errors import InsufficientWorkersError

if TYPE_CHECKING:
    from skillnet_platform.ray_internals.failure_policy import PolicyTrainer


#: Counter of the fits of this process, for their names.
_FITS = count()
#: Environment of Ray's workers. Tasks of changing lengths fragment the memory of a GPU that cannot
#: extend its segments. NCCL records its last operations, and writes them if one of them hangs.
WORKER_ENVIRONMENT = {
    SPIN_VARIABLE: SPIN_COUNT,
    **KEEP_FREED_MEMORY,
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    "TORCH_FR_BUFFER_SIZE": "2000",
    "TORCH_FR_DUMP_ON_TIMEOUT": "1",
}


@dataclass
class NestedFit:
    """Settings of a fit on Ray inside a trial of Ray Tune.

    Args:
        resources: reserved amounts of one worker, such as ``{"CPU": 1}``.
        callbacks: observers of Ray Train, such as the one that forwards reports to Tune.
    """

    resources: dict[str, float]
    callbacks: list[Any]


def run_ray_worker(settings: dict[str, Any]) -> None:
    """Run one Ray worker.

    The settings are plain values: a configuration is built and validated again in each worker,
    instead of being unpickled.

    Args:
        settings: see :func:`fit_on_ray`.
    """
    import ray.train

    config = configuration.build_config(FinetuneConfig, settings["config"])
    context = ray.train.get_context()
    # Counted here, because the driver may be on a node with other cores.
    threads = config.training.threads_per_worker or count_threads(
        settings["cpus"], context.get_local_world_size()
    )
    torch.set_num_threads(threads)
    if config.training.use_gpu:
        from ray.train.torch import get_device

        torch.cuda.set_device(get_device())
    node = ray.get_runtime_context().get_node_id()
    tracked, rank = settings["tracked"], context.get_world_rank()
    watch = DeviceWatch(config, Path(settings["run"]))
    leave = contextlib.nullcontext() if rank else preemption.watch_stop_signal(settings["leave"])
    with leave, watch.explain_errors():
        run_worker(
            ResolvedRun(config, Path(settings["run"])),
            rank,
            context.get_world_size(),
            (tracked[0], tracked[1]) if tracked else None,
            settings["on_evaluation"],
            is_remote=settings["driver_node"] != node,
            node_id=node if config.training.min_workers else None,
            callbacks=[watch, *settings["callbacks"]],
            final=FinalEvaluation(*settings["final"]) if settings["final"] else None,
        )


def fit_on_ray(
    run: ResolvedRun,
    tracked: tuple[str, str] | None,
    on_evaluation: OnEvaluation | None = None,
    nested: NestedFit | None = None,
    callbacks: Sequence[LoopCallback] = (),
    final: FinalEvaluation | None = None,
) -> None:
    """Train on ``training.workers`` Ray workers.

    If a worker dies, Ray restarts all workers up to ``training.max_failures`` times, and they
    resume from the newest valid checkpoint. A dead controller is restarted equally often. A user
    error, such as a full disk, ends the run. With ``training.min_workers`` the loss of a node is
    no failure, see :mod:`skillnet_platform.ray_internals.elastic`.

    Args:
        run: configuration with absolute paths, and the run's folder.
        tracked: MLflow run id and URI.
        on_evaluation: see :func:`pipelines.training.loop.worker.run_worker`; called in the workers,
            so Ray must be able to serialize it.
        nested: how to run inside a trial of Ray Tune.
        callbacks: observers of the training loop; Ray serializes them for the workers.
        final: how the workers evaluate the final model; None leaves that out.

    Raises:
        TerminatedError: the driver was preempted while an elastic run waited for nodes.
        DeviceLostError: a device failed, also after the restarts.
        UserError: the nodes have different builds of torch, or one has no GPU.
    """
    from skillnet_platform import cluster

    config = run.config
    workers = config.training.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # Ray's own watcher of preemption notices logs an error about itself; ours is watch_spot.sh.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    loop: dict[str, Any] = {
        "config": configuration.to_dict(config),
        "run": str(run.folder),
        "tracked": list(tracked) if tracked else None,
        "on_evaluation": on_evaluation,
        "callbacks": list(callbacks),
        "final": (final.splits, final.brief, final.source) if final is not None else None,
    }
    with cluster.ray_session(cpus=max(workers, cores or 1)):
        import ray
        from ray.exceptions import RayActorError
        from ray.train import ControllerError, WorkerGroupError

        from skillnet_platform.ray_internals.stop_signal import RayStopSignal

        leave = loop["leave"] = RayStopSignal()
        loop["driver_node"] = ray.get_runtime_context().get_node_id()
        nodes = [*capacity.list_living_nodes(ray), *capacity.list_startable_nodes()]
        resources = nested.resources if nested else worker_resources(config.training, nodes)
        loop["cpus"] = resources["CPU"]
        for attempts_left in range(config.training.max_failures, -1, -1):
            trainer = _trainer(config, run.folder, loop, resources, nested)
            try:
                # Only after Ray has started, because Ray installs its own handler.
                with preemption.listen_in_driver(leave):
                    trainer.fit()
                return
            except RayActorError as error:
                # The controller died, and its workers with it; it handles deaths of workers itself.
                if not attempts_left:
                    raise
                reason = str(error).strip().splitlines()[0]
                console.print_warning(f"the controller of Ray Train died ({reason}); restarting it")
            except WorkerGroupError as error:
                lost = find_device_loss(error.worker_failures)
                if lost is None:
                    raise
                raise lost from None
            except ControllerError as error:
                if isinstance(error.controller_failure, UserError):
                    raise UserError(str(error.controller_failure)) from None
                if not isinstance(error.controller_failure, InsufficientWorkersError):
                    raise
                received = preemption.received_signal()
                raise TerminatedError(
                    f"ended by {received.name} while too few nodes were available to train; run "
                    f"the same command with --name {config.name} to resume",
                    received,
                ) from None
            except SystemExit:
                # Ray Train turns Ctrl-C into SystemExit, which would look like a normal end.
                raise KeyboardInterrupt from None


def find_device_loss(failures: Mapping[int, BaseException]) -> DeviceLostError | None:
    """Return the loss of a device among the errors of the workers.

    The other workers fail as a consequence, with errors of the network.

    Args:
        failures: rank -> its error.
    """
    lost = (each for each in failures.values() if isinstance(each, DeviceLostError))
    # Ray's copy of an error has a traceback in its text.
    return next((DeviceLostError(str(getattr(each, "cause", each))) for each in lost), None)


def worker_resources(
    training: TrainingConfig, nodes: Sequence[capacity.NodeResources]
) -> dict[str, float]:
    """Return the resources that each worker reserves in Ray.

    Args:
        training: settings of the training.
        nodes: resources of each node that is alive or may be started.
    """
    if not training.use_gpu:
        return {"CPU": 1.0}
    # A GPU waits for its batches if other programs use the CPUs beside it.
    return {"CPU": float(capacity.share_of_cpus(nodes)), "GPU": 1.0}


def _trainer(
    config: FinetuneConfig,
    run: Path,
    loop: dict[str, Any],
    resources: dict[str, float],
    nested: NestedFit | None,
) -> "PolicyTrainer":
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig

    from skillnet_platform.ray_internals.failure_policy import PolicyTrainer, WorkerStartCallback

    training = config.training
    workers: Any = training.workers
    trainer_class: Any = PolicyTrainer
    if training.min_workers:
        from skillnet_platform.ray_internals.elastic import ElasticTrainer

        workers = (training.min_workers, training.workers)
        trainer_class = functools.partial(
            ElasticTrainer,
            stop_requested=loop["leave"].is_set,
            request_resize=preemption.request_stop,
        )
    scaling = ScalingConfig(  # type: ignore[call-arg]
        num_workers=workers,
        elastic_resize_monitor_interval_s=training.resize_interval_s,
        use_gpu=training.use_gpu,
        resources_per_worker=resources,
        placement_strategy=training.placement_strategy.upper(),
    )
    trainer: PolicyTrainer = trainer_class(
        run_ray_worker,
        train_loop_config=loop,
        scaling_config=scaling,
        backend_config=build_process_group_config(training.use_gpu, training.collective_timeout_s),
        run_config=RunConfig(
            # A run resumes from its own checkpoints, so each fit is a new one for Ray.
            name=f"fit-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{next(_FITS)}",
            **fit_storage(config, run),
            logging_config=LoggingConfig(log_level="WARNING"),
            worker_runtime_env={
                "env_vars": WORKER_ENVIRONMENT | {"TORCH_FR_DUMP_TEMP_FILE": f"{run}/nccl-rank-"}
            },
            # Ray's type covers only callbacks of users, but it accepts those of workers as well.
            callbacks=[
                WorkerStartCallback(preemption.listen_in_worker),  # type: ignore[list-item]
                *(nested.callbacks if nested else []),
            ],
            failure_config=FailureConfig(  # type: ignore[call-arg]
                max_failures=training.max_failures, controller_failure_limit=3
            ),
        ),
    )
    return trainer
