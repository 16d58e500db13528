"""Runs of a study for a plan of their memory: :func:`request_planned_study`."""

from dataclasses import replace

from pipelines.planning.memory_check import MemoryCheck, PlannedRun
from skillnet_platform.cluster.resource_request import ResourceRequest
from sweeps.config.resources import request_study
from sweeps.config.study import StudyConfig
from sweeps.study.study import TuningResult, build_final_trials, build_tuning_trials


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
    untuned = {label: TuningResult(label) for label in config.systems}
    planned, share = [], config.resources.gpus or 1.0
    for trial in [*build_final_trials(config, untuned), *build_tuning_trials(config)]:
        label = trial.group or trial.name
        planned.append(PlannedRun(trial.config, label, "run.", share))
        if trial.pretrain is not None:
            planned.append(
                PlannedRun(trial.pretrain, f"pretraining of {label}", "pretraining.", share)
            )
    return planned
