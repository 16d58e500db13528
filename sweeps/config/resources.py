"""Resources of one trial of a sweep or study."""

from dataclasses import replace
from typing import Protocol

from pipelines.training.config.resources import request_workers
from pipelines.training.config.run import FinetuneConfig, TrainingConfig
from skillnet_platform.cluster.resource_request import (
    ResourceRequest,
    collect_locations,
    local_run_dir,
    select_model_paths,
)
from sweeps.config.trials import ResourceConfig


class TrialsConfig(Protocol):
    """Configuration of a command that runs trials: a sweep or a study."""

    name: str | None
    run_dir: str | None
    resources: ResourceConfig

    @property
    def run(self) -> FinetuneConfig:
        """Configuration of a trial."""


def request_trial(config: TrialsConfig, training: TrainingConfig) -> ResourceRequest:
    """Return the workers of one trial.

    Args:
        config: settings of the sweep or study.
        training: settings of the trial's training.
    """
    return request_workers(training, config.resources.cpus, config.resources.gpus)


def request_run(config: TrialsConfig, training: TrainingConfig) -> ResourceRequest:
    """Return the workers of one trial, with the places of its corpora, models and results.

    Args:
        config: settings of the sweep or study.
        training: settings of the trial's training.
    """
    return replace(
        request_trial(config, training),
        locations=collect_locations(config.run.data, config.run_dir, config.run.storage.mirror),
        models=select_model_paths(config.run.init_from),
        run_dir=local_run_dir(config.run_dir),
        run_name=config.name or "",
    )
