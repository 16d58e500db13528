"""Runs of a study for a plan of their memory: :func:`request_planned_study`."""

from dataclasses import replace

from pipelines.planning.memory_check import MemoryCheck, PlannedRun
from skillnet_platform.cluster.resource_request import ResourceRequest
from sweeps.config.resources import request_study
from sweeps.config.study import StudyConfig
from sweeps.study.study import build_final_trials
from sweeps.study.tuning import STAGES, build_stage_trials, start_tuning


def request_planned_study(config: StudyConfig) -> ResourceRequest:
    """Return the request of one run of a study, with the check of the memory of all systems."""
    check = MemoryCheck(lambda: list_study_runs(config))
    return replace(request_study(config), find_memory_problem=check)


def list_study_runs(config: StudyConfig) -> list[PlannedRun]:
    """Return the tuning trials, final runs and pretrainings of a study.

    Args:
        config: of the study. The final runs have its settings, not those that tuning will choose.

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
