"""Runs of ``skillnet grow`` for a plan, from the configuration of the model that grows.

No weight is read: the model is built without values.
"""

from pathlib import Path

import torch

from pipelines.training.config.growth import GrowConfig
from pipelines.training.config.resources import PlannedRun
from pipelines.training.growth import runs
from pipelines.training.growth.verification import added_files
from pipelines.training.runs.model_source import resolve_model
from skillnet.model import SkillNet
from skillnet.serialization import read_config, read_manifest
from skillnet.skipped_init import SkippedInit
from skillnet.systems import build_system
from skillnet_platform.errors import UserError


def list_growth_runs(config: GrowConfig) -> list[PlannedRun]:
    """Return the growth, and its reference runs that train other weights.

    Args:
        config: settings of the growth.

    Raises:
        UserError: the model or a corpus is missing, or the model is of another system.
    """
    source = resolve_model(config.source, config.tracking.uri)
    try:
        shape, system, options = read_config(source.weights, read_manifest(source.weights))
        with torch.device("meta"), SkippedInit():
            before = build_system(system, shape, options)
    except ValueError as error:
        raise UserError(str(error)) from None
    if not isinstance(before, SkillNet):
        raise UserError(f"{source.name}: system {system} has no skills; give a skillnet model")
    settings = runs.build_growth_config(config, source, before)
    with torch.device("meta"), SkippedInit():
        grown = runs.build_grown_model(config, before, settings.model.tasks[config.task.name])
    settings.training.trainable = added_files(before, grown)
    planned = [PlannedRun(settings, "growth")]
    for name in config.references:
        # `without_skill` trains fewer files than the growth.
        if name != "without_skill":
            other = runs.build_reference_config(name, config, settings, source, Path())
            assert other is not None
            planned.append(PlannedRun(other, f"reference {name}"))
    return planned
