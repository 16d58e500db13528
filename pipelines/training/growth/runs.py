"""Runs of a growth in the ordinary training loop: the growth itself, and its reference runs.

``skillnet grow`` builds the configurations with :func:`build_growth_config` and
:func:`build_reference_config`.
"""

import copy
import time
from dataclasses import replace
from pathlib import Path

import torch

from pipelines.data.shards.dataset import open_corpus
from pipelines.training.config.growth import GrowConfig, Reference
from pipelines.training.config.resources import PlannedRun
from pipelines.training.config.run import FinetuneConfig
from pipelines.training.growth.verification import added_files, keep_task_settings
from pipelines.training.loop.init_from import record_origin
from pipelines.training.runs import model_source
from pipelines.training.runs.identity import digest_weights
from pipelines.training.runs.model_source import ModelSource, resolve_model
from skillnet.model import SkillNet
from skillnet.model_merging import add_skill, add_task
from skillnet.objectives.base import find_objective
from skillnet.serialization import read_config, read_manifest, save_model
from skillnet.skills import SkillPlan, Task
from skillnet.skipped_init import SkippedInit
from skillnet.systems import build_system
from skillnet_platform.config import build_config, load_yaml
from skillnet_platform.errors import UserError
from skillnet_platform.storage import commit_directory, data_root, scratch_directory
from skillnet_platform.storage.location import join_location, parse_location


def load_growable_model(source: ModelSource) -> SkillNet:
    """Load the model that grows, on the CPU.

    Args:
        source: the source model.

    Raises:
        UserError: the model is of another system, or its weights are float64.
    """
    model = model_source.load_source_model(source).cpu()
    if not isinstance(model, SkillNet) or model.system != SkillNet.system:
        raise UserError(
            f"{source.name}: system {model.system} has no skills; give a skillnet model"
        )
    if next(model.parameters()).dtype != torch.float32:
        raise UserError(
            f"{source.name}: the weights are float64, and training would change every file; "
            "give a float32 model"
        )
    return model


def build_grown_model(config: GrowConfig, before: SkillNet, task: Task) -> SkillNet:
    """Return a copy of the model with the new skill and task; the seed determines new weights.

    Args:
        config: settings of the growth.
        before: the source model.
        task: the new task.
    """
    # The source model stays as it is, because the report measures it after the training.
    grown = copy.deepcopy(before)
    torch.manual_seed(config.seed)
    if config.skill is not None:
        add_skill(grown, config.skill.name, config.skill.init_from, config.skill.rank)
    return add_task(grown, config.task.name, task)


def save_start_model(model: SkillNet, run_dir: str) -> str:
    """Save the initial model of a run in a directory that its digest names.

    Args:
        model: the initial model.
        run_dir: directory of runs.

    Returns:
        Path of the saved model; equal models share one directory.
    """
    starts = Path(run_dir) / ".starts"
    # Growths that start at the same time write to directories of their own.
    with scratch_directory(starts / "growing") as scratch:
        save_model(model, scratch / "model")
        # The identity of a run contains the digest of its initial weights, so a killed growth must
        # find the same weights again (decision 11).
        target = starts / str(digest_weights(str(scratch / "model")))[:16]
        if not target.is_dir():
            commit_directory(scratch / "model", target)
    return str(target)


def build_growth_config(
    config: GrowConfig, source: ModelSource, before: SkillNet
) -> FinetuneConfig:
    """Return the training configuration of a growth; old tasks are evaluated, not trained.

    Args:
        config: settings of the growth.
        source: the source model.
        before: the source model in memory.

    Raises:
        UserError: a name is in use, or a corpus is missing or unknown.
    """
    task, skill = config.task, config.skill
    if skill is not None and skill.name in before.config.skills:
        raise UserError(
            f"skill.name: {source.name} already has a skill {skill.name!r}; choose another name"
        )
    if task.name in before.config.tasks:
        raise UserError(
            f"task.name: {source.name} already has a task {task.name!r}; choose another name"
        )
    name = config.name or time.strftime("grow-%Y%m%d-%H%M%S")
    shape = before.config
    if skill is not None:
        try:
            shape = shape.with_skill(skill.name, skill.init_from, skill.rank)
        except ValueError as error:
            raise UserError(str(error)) from None
    shape = replace(shape, tasks=shape.tasks | {task.name: resolve_new_task(config)})
    # Old tasks take no steps; they are evaluated to show that they did not change.
    old = {name: keep_task_settings(source, name, config.corpora) for name in before.config.tasks}
    return FinetuneConfig(
        name=name,
        run_dir=config.run_dir,
        seed=config.seed,
        data=config.data,
        model=shape,
        tasks=old | {task.name: task.training},
        # A copy, because the caller sets its trainable files.
        training=replace(config.training),
        # `skillnet grow` registers the model itself, after it has checked the old parts.
        tracking=replace(config.tracking, register=False),
    )


def check_same_references(config: GrowConfig, stored: Path) -> None:
    """Raise UserError if a finished growth was compared with other references.

    Its own training is in the identity of its run, which is checked before.

    Args:
        config: settings of this call.
        stored: configuration of the finished growth.
    """
    before = build_config(GrowConfig, load_yaml(stored)).references
    if set(before) != set(config.references):
        raise UserError(
            f"the growth {config.name} has references {before}, not {config.references}; give "
            "another --name"
        )


def resolve_new_task(config: GrowConfig) -> Task:
    """Return the new task, with the number of outputs from its corpus if it is not given.

    Args:
        config: settings of the growth.

    Raises:
        UserError: the corpus has no list of classes or symbols.
    """
    task, outputs = config.task, config.task.outputs
    key = find_objective(task.objective).listed
    if not outputs and key is not None:
        data = parse_location(config.data, data_root())
        names = open_corpus(join_location(data, task.training.corpus)).manifest.get(key)
        if not names:
            raise UserError(
                f"the corpus {task.training.corpus} has no list of {key}; give --task.outputs"
            )
        outputs = len(names)
    return Task(task.objective, dict(task.towers), outputs)


def build_reference_config(
    name: Reference, config: GrowConfig, settings: FinetuneConfig, source: ModelSource, run: Path
) -> FinetuneConfig | None:
    """Return the training configuration of a reference run.

    Args:
        name: kind of reference.
        config: settings of the growth.
        settings: training configuration of the growth.
        source: the source model.
        run: folder of the growth.

    Returns:
        None for ``without_skill`` if a tower of the new task has no other skill, or without a new
        skill.
    """
    task = config.task.name
    spec = settings.model.tasks[task]
    base = replace(settings, name=f"{settings.name}-{name}", run_dir=str(run / "references"))
    only_new = {task: settings.tasks[task]}
    if name == "everything":
        # No list means that all files train.
        return replace(base, training=replace(settings.training, trainable=[]))
    if name == "fresh":
        return replace(
            base,
            init_from=None,
            tasks=only_new,
            model=replace(settings.model, tasks={task: spec}),
            training=replace(settings.training, trainable=[]),
        )
    if config.skill is None:
        return None
    new = config.skill.name
    remaining = {
        tower: tuple(skill for skill in plan.skills if skill != new)
        for tower, plan in spec.towers.items()
    }
    if not all(remaining.values()):
        return None
    towers = {t: SkillPlan(remaining[t], plan.modality) for t, plan in spec.towers.items()}
    # The head depends on the seed only, so a resumed reference starts from the same weights.
    torch.manual_seed(config.seed)
    model = add_task(load_growable_model(source), task, replace(spec, towers=towers))
    # The model of this reference has no file of the new skill.
    trainable = [file for file in settings.training.trainable if file != f"skill-{new}"]
    return replace(
        base,
        init_from=record_origin(Path(save_start_model(model, str(settings.run_dir))), source.name),
        tasks=only_new,
        model=model.config,
        training=replace(settings.training, trainable=trainable),
    )


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
    settings = build_growth_config(config, source, before)
    with torch.device("meta"), SkippedInit():
        grown = build_grown_model(config, before, settings.model.tasks[config.task.name])
    settings.training.trainable = added_files(before, grown)
    planned = [PlannedRun(settings, "growth")]
    for name in config.references:
        # `without_skill` trains fewer files than the growth.
        if name != "without_skill":
            other = build_reference_config(name, config, settings, source, Path())
            assert other is not None
            planned.append(PlannedRun(other, f"reference {name}"))
    return planned
