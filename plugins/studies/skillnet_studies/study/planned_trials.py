"""Runs of a study for a plan of their memory, and the resources of one: :func:`request_study`."""

from dataclasses import replace

from pipelines.training.config.resources import PlannedRun
from skillnet_platform.cluster.resource_request import ResourceRequest, select_model_paths
from skillnet_studies.config.study import StudyConfig
from skillnet_studies.study.study import build_final_trials
from skillnet_studies.study.tuning import STAGES, build_stage_trials, start_tuning
from sweeps.config.trials import request_run, request_trial


def request_study(config: StudyConfig) -> ResourceRequest:
    """Return the request of one run of a study, and of its pretraining if a system has one."""
    first = replace(
        request_run(config, config.run.training), list_runs=lambda: list_study_runs(config)
    )
    if not any(system.pretrain for system in config.systems.values()):
        return first
    workers = request_trial(config, config.pretraining.training)
    models = select_model_paths(config.run.init_from, config.pretraining.init_from)
    same = workers == request_trial(config, config.run.training)
    return replace(first, models=models, next_stage=None if same else workers)


def list_study_runs(config: StudyConfig) -> list[PlannedRun]:
    """Return the tuning trials, final runs and pretrainings of a study.

    Args:
        config: settings of the study. The final runs have its settings, not those that tuning will
            choose.

    Raises:
        UserError: the study is invalid.
    """
    untuned = start_tuning(config)
    planned, share = [], config.resources.gpus or 1.0
    tuning = [each for stage in STAGES for each in build_stage_trials(config, stage, untuned)]
    for trial in [*build_final_trials(config, untuned), *tuning]:
        label = trial.group or trial.name
        planned.append(PlannedRun(trial.config, label, "run.", share))
        if trial.pretrain is not None:
            planned.append(
                PlannedRun(trial.pretrain, f"pretraining of {label}", "pretraining.", share)
            )
    return planned
