"""The runs of a growth on the ordinary loop: the growth itself, and what it is held against."""

import copy
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import torch

from pipelines.config.growth import GrowConfig, Reference
from pipelines.config.run import FinetuneConfig, TaskTraining
from pipelines.evaluation.evaluator import locate_task_corpus
from pipelines.runs import model_source
from pipelines.runs.identity import digest_weights
from pipelines.runs.model_source import ModelSource
from pipelines.shards.dataset import open_corpus
from skillnet.growth import add_skill, add_task
from skillnet.model import SkillNet
from skillnet.skills import SkillPlan, Task
from skillnet_platform.errors import UserError
from skillnet_platform.storage import commit_directory, data_root
from skillnet_platform.storage.location import join_location, parse_location


def load_growable_model(source: ModelSource) -> SkillNet:
    """The model that grows, on the CPU.

    Raises:
        UserError: a model of another system, or weights that training would rewrite.
    """
    model = model_source.load_source_model(source).cpu()
    if not isinstance(model, SkillNet) or model.system != SkillNet.system:
        raise UserError(f"{source.name} is a {model.system} model; only a skillnet has skills")
    if next(model.parameters()).dtype != torch.float32:
        raise UserError(f"{source.name} has float64 weights, which training would rewrite")
    return model


def build_grown_model(config: GrowConfig, before: SkillNet, task: Task) -> SkillNet:
    """A copy of the model with the new skill and task; what is drawn hangs on the seed."""
    grown = copy.deepcopy(before)
    torch.manual_seed(config.seed)
    add_skill(grown, config.skill.name, config.skill.init_from)
    return add_task(grown, config.task.name, task)


def save_start_model(model: SkillNet, run_dir: str) -> str:
    """Write what a run starts from, under its own digest: the same again is the same folder."""
    aside = Path(run_dir) / ".starts" / f".growing-{os.getpid()}"
    model.save_pretrained(aside)
    kept = aside.with_name(str(digest_weights(str(aside)))[:16])
    if kept.is_dir():
        shutil.rmtree(aside)
    else:
        commit_directory(aside, kept)
    return str(kept)


def build_growth_config(
    config: GrowConfig, source: ModelSource, before: SkillNet
) -> FinetuneConfig:
    """The growth as a run of the ordinary loop; old tasks are measured and take no steps.

    Raises:
        UserError: a name in use, or a corpus that is missing or not known.
    """
    task, skill = config.task, config.skill
    if skill.name in before.config.skills:
        raise UserError(f"skill.name: {source.name} already has a skill {skill.name!r}")
    if task.name in before.config.tasks:
        raise UserError(f"task.name: {source.name} already has a task {task.name!r}")
    name = config.name or time.strftime("grow-%Y%m%d-%H%M%S")
    shape = replace(
        before.config,
        skills=(*before.config.skills, skill.name),
        tasks=before.config.tasks | {task.name: resolve_new_task(config)},
    )
    old = {each: old_task_settings(each, config, source) for each in before.config.tasks}
    return FinetuneConfig(
        name=name,
        run_dir=config.run_dir,
        seed=config.seed,
        data=config.data,
        model=shape,
        tasks=old | {task.name: task.training},
        training=replace(config.training),
        tracking=replace(config.tracking, register=False),
    )


def resolve_new_task(config: GrowConfig) -> Task:
    """The new task, with as many outputs as its corpus has classes or symbols."""
    task, outputs = config.task, config.task.outputs
    if not outputs and task.objective in ("classification", "ctc"):
        data = parse_location(config.data, data_root())
        key = "labels" if task.objective == "classification" else "symbols"
        names = open_corpus(join_location(data, task.training.corpus)).manifest.get(key)
        if not names:
            raise UserError(
                f"the corpus {task.training.corpus} names no {key}; give --task.outputs"
            )
        outputs = len(names)
    return Task(task.objective, dict(task.towers), outputs)


def old_task_settings(task: str, config: GrowConfig, source: ModelSource) -> TaskTraining:
    """How an old task is measured: as in the training of the source."""
    known = (source.settings.get("tasks") or {}).get(task) or {}
    corpora = {task: known["corpus"]} if known else {}
    corpus = Path(locate_task_corpus("", task, corpora | config.corpora)).name
    return TaskTraining(corpus, max_length=known.get("max_length"), eval_only=True)


def build_reference_config(
    name: Reference, config: GrowConfig, settings: FinetuneConfig, source: ModelSource, run: Path
) -> FinetuneConfig | None:
    """The run of a reference; None where the task has no skill but the new one."""
    task = config.task.name
    spec = settings.model.tasks[task]
    base = replace(settings, name=f"{settings.name}-{name}", run_dir=str(run / "references"))
    alone = {task: settings.tasks[task]}
    if name == "everything":
        return replace(base, training=replace(settings.training, trainable=[]))
    if name == "fresh":
        return replace(
            base,
            init_from=None,
            tasks=alone,
            model=replace(settings.model, tasks={task: spec}),
            training=replace(settings.training, trainable=[]),
        )
    left = {
        tower: tuple(skill for skill in plan.skills if skill != config.skill.name)
        for tower, plan in spec.towers.items()
    }
    if not all(left.values()):
        return None
    towers = {t: SkillPlan(left[t], plan.modality) for t, plan in spec.towers.items()}
    torch.manual_seed(config.seed)
    model = add_task(load_growable_model(source), task, replace(spec, towers=towers))
    kept = [file for file in settings.training.trainable if file != f"skill-{config.skill.name}"]
    return replace(
        base,
        init_from=save_start_model(model, str(settings.run_dir)),
        tasks=alone,
        model=model.config,
        training=replace(settings.training, trainable=kept),
    )
