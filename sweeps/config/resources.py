"""Resource requests of ``skillnet sweep`` and ``skillnet compare``."""

from dataclasses import replace

from pipelines.config.resources import request_workers
from pipelines.config.run import TrainingConfig
from skillnet_platform.cluster.resource_request import (
    ResourceRequest,
    collect_locations,
    local_run_dir,
    select_model_paths,
)
from sweeps.config.study import StudyConfig
from sweeps.config.sweep import SweepConfig


def request_sweep(config: SweepConfig) -> ResourceRequest:
    """Return the request of one trial of a sweep."""
    return _request_run(config, config.run.training)


def request_study(config: StudyConfig) -> ResourceRequest:
    """Return the request of one run of a study, and of its pretraining if a system has one."""
    first = _request_run(config, config.run.training)
    if not any(system.pretrain for system in config.systems.values()):
        return first
    workers = _request_trial(config, config.pretraining.training)
    models = select_model_paths(config.run.init_from, config.pretraining.init_from)
    same = workers == _request_trial(config, config.run.training)
    return replace(first, models=models, next_stage=None if same else workers)


def _request_trial(config: SweepConfig | StudyConfig, training: TrainingConfig) -> ResourceRequest:
    return request_workers(training, config.resources.cpus, config.resources.gpus)


def _request_run(config: SweepConfig | StudyConfig, training: TrainingConfig) -> ResourceRequest:
    return replace(
        _request_trial(config, training),
        locations=collect_locations(config.run.data, config.run_dir, config.run.storage.mirror),
        models=select_model_paths(config.run.init_from),
        run_dir=local_run_dir(config.run_dir),
        run_name=config.name or "",
    )
