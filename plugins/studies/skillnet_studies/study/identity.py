"""Check that a study can be resumed: finished runs must match the current configuration.

Systems, seeds and trials may be added at any time. Settings that no run has used may change.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.training.config.run import FinetuneConfig
from pipelines.training.runs.layout import CONFIG
from skillnet.skills import Task
from skillnet_platform import config as configuration
from skillnet_platform.errors import UserError
from skillnet_studies.config.study import STUDY_FILE, StudyConfig
from sweeps.trials.trial import Trial


def check_unchanged(config: StudyConfig, trials: Sequence[Trial], folder: Path) -> None:
    """Raise UserError if a trial was started with other settings; nothing is written.

    Args:
        config: the study.
        trials: trials of the current configuration.
        folder: directory of all trials.

    Raises:
        UserError: names the first trial and the first setting that differs.
    """
    for trial in trials:
        stored = folder / trial.name / CONFIG
        # A trial that never started fits any configuration.
        if not stored.is_file():
            continue
        before = configuration.build_config(FinetuneConfig, configuration.load_yaml(stored))
        difference = _compare_runs(before, trial.config) or _compare_pretraining(
            before, trial, folder
        )
        if not difference:
            continue
        study = config.folder / STUDY_FILE
        known = _decisive_keys(configuration.load_yaml(study)) if study.is_file() else {}
        now = _decisive_keys(configuration.to_dict(config))
        # Keys may be added to a study: only common keys are compared.
        both = known.keys() & now.keys()
        changed = _first_difference({k: known[k] for k in both}, {k: now[k] for k in both})
        cause = f"has {changed}; its run" if changed else "was started with other settings: its run"
        raise UserError(
            f"the study {config.name} {cause} {trial.name} was trained with {difference}. "
            f"Give another --name, or resume the study with --config {study}"
        )


def find_study_difference(stored: Mapping[str, Any], config: StudyConfig) -> str:
    """Return the first difference of a stored study that changes its runs; "" for none.

    Args:
        stored: content of its ``study.yaml``; paths and addresses may differ.
        config: the study of this call.
    """
    known = _decisive_keys(stored)
    now = _decisive_keys(configuration.to_dict(config))
    places = ("data", "run_dir", "name", "tracking", "storage", "corpora", "init_from")
    keys = {
        key
        for key in known.keys() & now.keys()
        # Systems may be added; their keys are in only one of the two.
        if not (key.split(".")[0] in ("run", "pretraining") and key.split(".")[1] in places)
    }
    return _first_difference({k: known[k] for k in keys}, {k: now[k] for k in keys})


def _compare_pretraining(before: FinetuneConfig, trial: Trial, folder: Path) -> str:
    """Return the first difference of the pretrainings as text; "" for none or if unknown."""
    if (trial.pretrain is None) != (not before.init_from):
        return "another value of pretrain"
    if trial.pretrain is None or not before.init_from:
        return ""
    # A kept run has its pretraining in its own directory.
    place = folder / trial.name / before.init_from
    stored = (place if (place / CONFIG).is_file() else place.parent) / CONFIG
    if not stored.is_file():
        return ""
    start = configuration.build_config(FinetuneConfig, configuration.load_yaml(stored))
    difference = _compare_runs(start, trial.pretrain.joint())
    return f"a pretraining with {difference}" if difference else ""


def _compare_runs(before: FinetuneConfig, now: FinetuneConfig) -> str:
    """Return the first difference of two runs as text, without their initial weights."""
    from pipelines.training.runs.identity import find_identity_differences

    before = replace(before.joint(), init_from=None)
    now = replace(_resolve_tasks(now.joint(), before), init_from=None)
    return _format_difference(find_identity_differences(before, now))


def _resolve_tasks(now: FinetuneConfig, before: FinetuneConfig) -> FinetuneConfig:
    """Return a run whose model has the tasks that the start of the run would give it.

    The start reads plans and numbers of outputs from the corpora. Here they are those of the run
    that was started, because a run with other outputs than its corpus is rejected.
    """
    from pipelines.training.loop.resolved_run import resolve_model_tasks

    tasks = dict(resolve_model_tasks(now, {}).model.tasks)
    for name in before.model.tasks.keys() & now.tasks.keys():
        tasks.setdefault(name, before.model.tasks[name])
    model = replace(
        now.model,
        tasks=_with_outputs(tasks, before.model.tasks),
        reference_tasks=_with_outputs(now.model.reference_tasks, before.model.reference_tasks),
    )
    return replace(now, model=model)


def _with_outputs(tasks: Mapping[str, Task], others: Mapping[str, Task]) -> dict[str, Task]:
    """Return tasks with the numbers of outputs of the tasks of the same names."""
    return {
        name: replace(task, outputs=others[name].outputs) if name in others else task
        for name, task in tasks.items()
    }


def _decisive_keys(study: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flat settings of a study that determine its runs."""
    decisive = ("run", "pretraining", "systems", "tuning")
    return configuration.flatten_tree({key: study[key] for key in decisive if key in study})


def _first_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return the first difference of two flat trees as text; "" if nothing differs."""
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return _format_difference({key: (old.get(key), new.get(key)) for key in keys})


def _format_difference(differing: Mapping[str, tuple[Any, Any]]) -> str:
    """Return ``training.lr 0.1, not 0.2, and 3 more``; "" for no difference."""
    if not differing:
        return ""
    key, (old, new) = next(iter(differing.items()))
    more = f", and {len(differing) - 1} more" if len(differing) > 1 else ""
    return f"{key} {old}, not {new}{more}"
