"""Runs of a system of a study: the study's run with the system's own settings and pretraining."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from pipelines.training.config.run import FinetuneConfig, PretrainConfig
from skillnet_platform import config as configuration
from skillnet_platform.config.schema import check_keys, nest_value
from skillnet_platform.errors import UserError
from skillnet_studies.config.study import StudyConfig

Run = TypeVar("Run", FinetuneConfig, PretrainConfig)

#: Start of the keys of settings of a pretraining.
PRETRAINING = "pretraining."


def build_base_run(config: StudyConfig, label: str, seed: int) -> FinetuneConfig:
    """Return the study's run with the system's own settings.

    Args:
        config: the study.
        label: label of the system.
        seed: seed of the run.

    Raises:
        UserError: an unknown system, option or key.
    """
    from skillnet.systems import find_system

    entry = config.systems[label]
    try:
        # Checked here, because a wrong option must fail before the first trial trains.
        system = find_system(entry.system)
        system.model.parse_options(entry.options)
    except (ValueError, TypeError) as error:
        raise UserError(f"systems.{label}: {error}") from None
    if entry.rate_per_task and system.shares_weights:
        raise UserError(
            f"systems.{label}.rate_per_task: the tasks of {entry.system} share weights, so the "
            "rate of one changes the scores of the others. Set it to false"
        )
    where = f"systems.{label}.set"
    if not entry.pretrain and (keys := _select_pretraining(entry.set)):
        raise UserError(f"{where}: {PRETRAINING}{min(keys)} needs pretrain: true")
    run = apply_settings(config.run, entry.set, where)
    steps = round(entry.steps_factor * run.training.steps)
    run = replace(run, training=replace(run.training, steps=max(steps, 1)))
    # Runs of a study are not registered, and the study's own run logs system metrics.
    tracking = replace(config.tracking, register=False, system_metrics=False)
    return replace(
        run, seed=seed, system=entry.system, options=dict(entry.options), tracking=tracking
    )


def apply_settings(run: FinetuneConfig, settings: Mapping[str, Any], where: str) -> FinetuneConfig:
    """Return a run with tuned settings, without those of its pretraining.

    Args:
        run: the base run.
        settings: flat key -> value.
        where: source of the values, for error messages.
    """
    own = {key: value for key, value in settings.items() if not key.startswith(PRETRAINING)}
    return override_run(run, own, where)


def _select_pretraining(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the pretraining, without the start of their keys."""
    return {
        key.removeprefix(PRETRAINING): value
        for key, value in settings.items()
        if key.startswith(PRETRAINING)
    }


def build_pretraining(
    config: StudyConfig, label: str, run: FinetuneConfig, settings: Mapping[str, Any]
) -> PretrainConfig | None:
    """Return the pretraining of a run with its system, sizes and seed; None without one.

    Args:
        config: the study.
        label: label of the system.
        run: the run that starts from the pretraining.
        settings: flat key -> tuned value; those of the pretraining start with ``pretraining.``.
    """
    entry = config.systems[label]
    if not entry.pretrain:
        return None
    plan = override_run(
        config.pretraining, _select_pretraining(entry.set), f"systems.{label}.set: pretraining"
    )
    plan = override_run(plan, _select_pretraining(settings), "tuning: pretraining")
    return replace(
        plan,
        seed=run.seed,
        data=run.data,
        fold=run.fold,
        system=run.system,
        options=dict(run.options),
        # Sizes of the run, which follow its tasks in a baseline, but tasks of the pretraining.
        model=replace(run.joint().model, tasks=plan.model.tasks),
        tracking=run.tracking,
    )


def override_run(run: Run, keys: Mapping[str, Any], where: str) -> Run:
    """Return a run or a pretraining with some flat keys set to other values.

    Args:
        run: the base run or pretraining.
        keys: flat key -> value.
        where: source of the values, for error messages.

    Raises:
        UserError: an unknown key or a wrong value.
    """
    if not keys:
        return run
    tree = configuration.to_dict(run)
    for key, value in keys.items():
        configuration.merge_trees(tree, check_keys(type(run), nest_value(key, value), where))
    return configuration.build_config(type(run), tree, dict.fromkeys(keys, where))
