"""Runs of a system of a study: the study's run with the system's own settings and pretraining."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipelines.config.run import FinetuneConfig, PretrainConfig
from skillnet_platform import config as configuration
from skillnet_platform.config.schema import check_keys, nest_value
from skillnet_platform.errors import UserError
from sweeps.config.study import StudyConfig

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
    run = override_run(config.run, entry.set, f"systems.{label}.set")
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
    if not config.systems[label].pretrain:
        return None
    plan = config.pretraining
    rate = settings.get(f"{PRETRAINING}training.lr")
    if rate is not None:
        plan = replace(plan, training=replace(plan.training, lr=rate))
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


def override_run(run: FinetuneConfig, keys: Mapping[str, Any], where: str) -> FinetuneConfig:
    """Return a run with some flat keys set to other values.

    Args:
        run: the base run.
        keys: flat key -> value.
        where: source of the values, for error messages.

    Raises:
        UserError: an unknown key or a wrong value.
    """
    if not keys:
        return run
    tree = configuration.to_dict(run)
    for key, value in keys.items():
        configuration.merge_trees(tree, check_keys(FinetuneConfig, nest_value(key, value), where))
    return configuration.build_config(FinetuneConfig, tree, dict.fromkeys(keys, where))
