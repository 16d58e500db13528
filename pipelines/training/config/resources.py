"""Resource requests of commands, computed from their configurations.

The ``resources`` hooks of the commands call these functions; ``skillnet doctor`` and
``skillnet submit`` compare the requests with a cluster.
"""

import os
from dataclasses import dataclass, replace

from pipelines.training.config.run import FinetuneConfig, TrainingConfig
from skillnet_platform.cluster.gpu_types import GpuType
from skillnet_platform.cluster.resource_request import (
    ResourceRequest,
    collect_locations,
    local_run_dir,
    select_model_paths,
)


@dataclass(frozen=True)
class PlannedRun:
    """One training run of a command.

    Args:
        config: settings of the run.
        label: its name among the runs of the command; empty for the only run.
        prefix: beginning of its options on the command line, such as ``run.``.
        share: GPUs of each worker; several trials share a GPU if it is below 1.
    """

    config: FinetuneConfig
    label: str = ""
    prefix: str = ""
    share: float = 1.0

    def take_share(self, gpu: GpuType) -> GpuType:
        """Return the part of a GPU that a worker of the run may use."""
        return replace(gpu, memory_gb=gpu.memory_gb * min(self.share, 1.0))


def trains_in_process(training: TrainingConfig) -> bool:
    """Return whether a command trains in its own process, without Ray (decision 71).

    Args:
        training: settings of the training.
    """
    is_alone = training.workers == 1 and training.min_workers is None and not training.use_gpu
    return is_alone and not os.environ.get("RAY_ADDRESS")


def request_workers(
    training: TrainingConfig, cpus: float | None = None, gpus: float = 0.0
) -> ResourceRequest:
    """Return the workers, CPUs and GPUs that a training needs.

    Args:
        training: settings of the training.
        cpus: CPUs of each worker; None is one.
        gpus: GPUs of each worker. 0 takes one GPU with ``use_gpu``, else none.
    """
    workers = training.workers
    fewest = training.min_workers or 0
    return ResourceRequest(
        workers,
        workers * (gpus or float(training.use_gpu)),
        cpus or 1.0,
        min_workers=fewest if fewest < workers else 0,
        spread=training.placement_strategy == "strict_spread",
        keep_checkpoints=training.keep_checkpoints,
        uses_tracker=True,
    )


def request_training(config: FinetuneConfig) -> ResourceRequest:
    """Return the request of a fine-tuning, pretraining or quickstart run."""
    return replace(
        request_workers(config.training),
        locations=collect_locations(config.data, config.run_dir, config.storage.mirror),
        models=select_model_paths(config.init_from),
        run_dir=local_run_dir(config.run_dir),
        run_name=config.name or "",
        list_runs=lambda: [PlannedRun(config)],
    )


def request_model(model: str | None, data: str | None) -> ResourceRequest:
    """Return the request of a command that reads a trained model and corpora, on one CPU.

    Args:
        model: path, URI, run name or registry address of the model.
        data: path or URI of the corpora.
    """
    return ResourceRequest(
        locations=(data,) if data else (), models=select_model_paths(model), uses_tracker=True
    )
