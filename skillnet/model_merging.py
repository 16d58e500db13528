"""Merging of models that grew from one base: the union of their skills, stems, heads and tasks.

Growth freezes all old files, so models that grew from one base have equal files in common. The
merged model has these files once, and all other files of every model. No weight changes, and no
task reads another set of skills, so the outputs of every task stay identical, bit for bit.
:func:`merge_models` is the entry point; ``skillnet merge`` calls it.
"""

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skillnet.config import INITIAL_SETTINGS, NAME_SETTINGS, LowRankSkill, SkillNetConfig
from skillnet.modality import find_stem
from skillnet.model import SkillNet
from skillnet.multitask_model import TaskModel
from skillnet.objectives.heads import build_head
from skillnet.serialization import (
    check_file,
    list_task_files,
    load_tensors,
    read_config,
    read_manifest,
    read_vocabulary,
    save_tensors,
    write_config,
    write_manifest,
)
from skillnet.skill_weights import SkillWeights, require_unused_name
from skillnet.skills import SkillPlan, Task, check_names, check_plan, find_task, nearest_hint
from skillnet.skipped_init import SkippedInit
from skillnet.vocabulary import ModelVocabulary
from skillnet_files.commit import commit_directory, make_scratch_directory


def add_skill(model: SkillNet, name: str, init_from: str | None = None, rank: int = 0) -> SkillNet:
    """Add a skill in place to every module that has skills.

    Args:
        model: a trained model; existing tensors are not changed.
        name: key of the new skill in ``model.skills``.
        init_from: existing skill to copy; None draws random weights.
        rank: columns of A in a difference to ``init_from``, which starts at zero; 0 gives the new
            skill the form of the others.

    Returns:
        The same model.

    Raises:
        ValueError: the name is in use, ``init_from`` is unknown, or the rank is invalid.
    """
    if name in model.config.skills:
        raise ValueError(f"the model already has a skill {name!r}; choose another name")
    known = model.config.skills
    check_names((*known, name), "add_skill")
    # Checked first, so that a wrong value changes nothing.
    config = model.config.with_skill(name, init_from, rank)
    for module in model.modules():
        # Shared layers have one weight, named "shared", and get no new skill.
        if isinstance(module, SkillWeights) and set(known) <= set(module.names):
            module.add(name, init_from, config.find_form(name))
    model.config = config
    return model


def add_task(model: SkillNet, name: str, task: Task) -> SkillNet:
    """Add a task in place: its head, and a stem if its modality is new to the model.

    Args:
        model: a trained model; existing tensors are not changed.
        name: key of the new task in ``model.tasks``.
        task: objective and plans, over existing skills.

    Returns:
        The same model.

    Raises:
        ValueError: the name is in use, or a plan names an unknown skill.
    """
    if name in model.config.tasks:
        raise ValueError(f"the model already has a task {name!r}; choose another name")
    check_names((*model.config.tasks, name), "add_task")
    require_unused_name(model.heads, name, "task")
    for tower, plan in task.towers.items():
        check_plan(plan, model.config.skills, f"{name}.towers.{tower}")
    # The new parts join the device and type of the model.
    some = next(model.parameters())
    # Built before the model changes, so that an error leaves the model as it was.
    head = build_head(model.config, task).to(some.device, some.dtype)
    model.config = dataclasses.replace(model.config, tasks={**model.config.tasks, name: task})
    for stem in task.stems:
        if stem not in model.stems:
            model.stems[stem] = find_stem(stem)(model.config).to(some.device, some.dtype)
    model.heads[name] = head
    return model


def remove_skill(model: SkillNet, name: str) -> SkillNet:
    """Remove a skill in place from every module that has skills.

    Args:
        model: any SkillNet.
        name: a skill that no plan of the model's tasks activates.

    Returns:
        The same model.

    Raises:
        ValueError: a plan activates the skill, or another skill is a difference to it.
    """
    # Replaced first: the configuration rejects plans with a skill that it lacks.
    model.config = model.config.without([name])
    for module in model.modules():
        if isinstance(module, SkillWeights) and name in module.names:
            module.remove(name)
    return model


def remove_task(model: TaskModel, name: str) -> TaskModel:
    """Remove a task and its head in place. Skills and stems stay.

    Args:
        model: any system.
        name: key of the task in ``model.tasks``.

    Returns:
        The same model.

    Raises:
        ValueError: the model does not have this task.
    """
    find_task(name, model.config.tasks)
    tasks = {task: spec for task, spec in model.config.tasks.items() if task != name}
    model.config = dataclasses.replace(model.config, tasks=tasks)
    model.drop_task(name)
    return model


SUFFIX = ".safetensors"


@dataclass(frozen=True)
class MergeParent:
    """One of the models that are merged.

    Args:
        name: for messages.
        folder: directory of the saved model.
        config: shape, skills and tasks, with the new names.
        vocabulary: tokenizer digest and output names of the model, with the new names of tasks.
        sources: file of the merged model -> (file of this model, old name, new name).
        manifest: parsed ``manifest.json`` of the saved model.
    """

    name: str
    folder: Path
    config: SkillNetConfig
    vocabulary: ModelVocabulary
    sources: dict[str, tuple[str, str, str]]
    manifest: dict[str, Any]

    @property
    def hashes(self) -> dict[str, str]:
        """File of the merged model -> sha256 of this model's file."""
        listed = self.manifest["files"]
        return {file: listed[path]["sha256"] for file, (path, _, _) in self.sources.items()}

    def read_weights(self, file: str) -> dict[str, Tensor]:
        """Return the tensors of a file, with the names that they have in the merged model.

        Args:
            file: name in the merged model.

        Raises:
            ValueError: the file does not match its manifest.
        """
        _, old, new = self.sources[file]
        tensors = load_tensors(self.check_source(file))
        if file.startswith("head-"):
            return {
                f"heads.{new}.{name.split('.', 2)[2]}": value for name, value in tensors.items()
            }
        if file.startswith("skill-"):
            return {name.removesuffix(old) + new: value for name, value in tensors.items()}
        return tensors

    def check_source(self, file: str) -> Path:
        """Return the path of this model's file for a file of the merged model.

        Raises:
            ValueError: the file does not match its manifest.
        """
        return check_file(self.folder, self.sources[file][0], self.manifest)


@dataclass
class MergePlan:
    """Files of a merged model.

    Args:
        config: shape, skills and tasks.
        vocabulary: tokenizer digest and output names of all tasks.
        origins: file -> the parents that have it.
        averaged: files whose weights differ between the parents and are averaged.
    """

    config: SkillNetConfig
    vocabulary: ModelVocabulary
    origins: dict[str, list[MergeParent]]
    averaged: list[str] = field(default_factory=list)

    @property
    def is_exact(self) -> bool:
        """Whether every file is that of a parent."""
        return not self.averaged


def read_parent(folder: Path, name: str, renames: Mapping[str, str] | None = None) -> MergeParent:
    """Read the configuration and the hashes of a saved model.

    Args:
        folder: directory of the saved model.
        name: for messages.
        renames: old name -> new name of skills and tasks of this model.

    Raises:
        ValueError: the model is damaged or of another system, a name is unknown or in use, or a new
            name would change the order in which a plan adds its skills.
    """
    manifest = read_manifest(folder)
    config, system, _ = read_config(folder, manifest)
    if system != SkillNet.system:
        raise ValueError(f"{name}: system {system} has no skills; give skillnet models")
    names = dict(renames or {})
    known = {*config.skills, *config.tasks}
    for old, new in names.items():
        if old not in known:
            raise ValueError(
                f"rename {old}={new}: {name} has no skill or task {old!r}"
                f"{nearest_hint(old, sorted(known))}"
            )
        if new in known:
            raise ValueError(f"rename {old}={new}: {name} already has {new!r}; choose another name")
    vocabulary = read_vocabulary(folder, manifest)
    outputs = {names.get(task, task): value for task, value in vocabulary.outputs.items()}
    scales = {names.get(task, task): value for task, value in vocabulary.scales.items()}
    sources: dict[str, tuple[str, str, str]] = {}
    for path in manifest["files"]:
        if not path.endswith(SUFFIX):
            continue
        file = path.removesuffix(SUFFIX)
        kind, _, old = file.partition("-")
        new = names.get(old, old) if kind in ("skill", "head") else old
        sources["-".join(filter(None, (kind, new)))] = (path, old, new)
    return MergeParent(
        name,
        folder,
        _rename_config(config, names, name),
        ModelVocabulary(vocabulary.tokenizer, outputs, scales),
        sources,
        manifest,
    )


def _rename_config(config: SkillNetConfig, names: Mapping[str, str], where: str) -> SkillNetConfig:
    if not names:
        return config
    tasks = {}
    for name, task in config.tasks.items():
        towers = {}
        for tower, plan in task.towers.items():
            renamed = [names.get(skill, skill) for skill in plan.skills]
            # Weights are added in the order of the names, and another order rounds differently.
            if renamed != sorted(renamed):
                old = next(skill for skill in plan.skills if skill in names)
                raise ValueError(
                    f"rename {old}={names[old]}: {where} adds the skills of {name} in the order of "
                    f"their names, and the new order {', '.join(sorted(renamed))} would round "
                    f"differently; choose a name that sorts like {old!r} among them"
                )
            towers[tower] = SkillPlan(tuple(renamed), plan.modality)
        tasks[names.get(name, name)] = dataclasses.replace(task, towers=towers)
    skills = tuple(names.get(skill, skill) for skill in config.skills)
    forms = {
        names.get(skill, skill): dataclasses.replace(
            form, source=names.get(form.source, form.source)
        )
        for skill, form in config.low_rank_skills.items()
    }
    return dataclasses.replace(config, skills=skills, tasks=tasks, low_rank_skills=forms)


def plan_merge(
    parents: Sequence[MergeParent],
    without: Sequence[str] = (),
    *,
    average_shared: bool = False,
) -> MergePlan:
    """Compare the parents, and decide which files the merged model has.

    Args:
        parents: at least two models.
        without: skills to leave out.
        average_shared: average files that differ, heads of one task included; otherwise they are
            rejected.

    Raises:
        ValueError: the shapes, tokenizers or common files differ, a name means two things, or a
            task needs a skill of ``without``.
    """
    first = parents[0]
    for other in parents[1:]:
        _check_shapes(first, other)
    tasks: dict[str, Task] = {}
    outputs: dict[str, tuple[str, ...]] = {}
    scales: dict[str, tuple[float, float]] = {}
    origins: dict[str, list[MergeParent]] = {}
    for parent in parents:
        for file in parent.sources:
            origins.setdefault(file, []).append(parent)
        for name, task in parent.config.tasks.items():
            names = parent.vocabulary.outputs.get(name)
            # A model that was not trained on a prepared corpus has no names.
            renamed = names is not None and outputs.get(name, names) != names
            scale = parent.vocabulary.scales.get(name)
            renamed |= scale is not None and scales.get(name, scale) != scale
            if renamed or tasks.get(name, task) != task:
                raise ValueError(
                    f"the task {name} of {parent.name} has other plans or outputs than that of "
                    f"{origins[f'head-{name}'][0].name}; rename one with --rename {name}=NEW"
                )
            tasks[name] = task
            if names is not None:
                outputs[name] = names
            if scale is not None:
                scales[name] = scale
    skills = tuple(dict.fromkeys(skill for parent in parents for skill in parent.config.skills))
    forms: dict[str, LowRankSkill | None] = {}
    for parent in parents:
        for skill in parent.config.skills:
            form = parent.config.low_rank_skills.get(skill)
            if forms.setdefault(skill, form) != form:
                raise ValueError(
                    f"the skill {skill} of {parent.name} has another rank or source than that of "
                    f"{origins[f'skill-{skill}'][0].name}; rename one with --rename {skill}=NEW"
                )
    config = dataclasses.replace(
        first.config,
        skills=skills,
        tasks=tasks,
        low_rank_skills={skill: form for skill, form in forms.items() if form is not None},
    )
    for skill in without:
        if skill not in skills:
            raise ValueError(
                f"without: no model has a skill {skill!r}{nearest_hint(skill, skills)}"
            )
        try:
            config = config.without([skill])
        except ValueError as error:
            raise ValueError(f"without: {error}") from None
        origins.pop(f"skill-{skill}", None)
    differing = [
        file
        for file, owners in origins.items()
        if len({parent.hashes[file] for parent in owners}) > 1
    ]
    if differing and not average_shared:
        raise ValueError(_describe_difference(differing, origins))
    tokenizer = next((p.vocabulary.tokenizer for p in parents if p.vocabulary.tokenizer), None)
    return MergePlan(config, ModelVocabulary(tokenizer, outputs, scales), origins, differing)


def _check_shapes(one: MergeParent, other: MergeParent) -> None:
    for field_ in dataclasses.fields(SkillNetConfig):
        if field_.name in (*NAME_SETTINGS, *INITIAL_SETTINGS):
            continue
        values = getattr(one.config, field_.name), getattr(other.config, field_.name)
        if values[0] != values[1]:
            raise ValueError(
                f"{one.name} has model.{field_.name} {values[0]}, {other.name} has {values[1]}; "
                "only models of one shape can be merged"
            )
    tokenizers = {one.vocabulary.tokenizer, other.vocabulary.tokenizer} - {None}
    if len(tokenizers) > 1:
        raise ValueError(
            f"{one.name} and {other.name} read tokens of two tokenizers: "
            f"{' and '.join(sorted(str(digest)[:16] for digest in tokenizers))}; train both on "
            "corpora that were prepared with one"
        )


def _describe_difference(files: Sequence[str], origins: Mapping[str, list[MergeParent]]) -> str:
    """Return why files that differ cannot be merged, and what to do."""
    common = [name for name in files if not name.startswith(("skill-", "head-"))]
    file = (common or files)[0]
    owners = origins[file]
    who = " and ".join(f"{parent.name} ({parent.hashes[file][:16]})" for parent in owners)
    kind, _, name = file.partition("-")
    if common:
        remedy = "the models have no common base. Grow both from one model"
    else:
        what = {"skill": "skill", "head": "task"}[kind]
        remedy = f"rename the {what} of one model with --rename {name}=NEW"
    return f"{file} differs: {who}; {remedy}, or give --average_shared, which changes the outputs"


#: Joins a file that differs between the parents that have it.
FileJoin = Callable[[str, Sequence[MergeParent]], dict[str, Tensor]]


def merge_models(
    plan: MergePlan, target: Path, join: FileJoin | None = None, **record: Any
) -> None:
    """Write the merged model. Files of the parents are copied, not computed again.

    Args:
        plan: result of :func:`plan_merge`.
        target: directory to write; an older model there is replaced at once.
        join: joins the files that differ; None takes their mean.
        **record: entries of the manifest, such as the parents.

    Raises:
        ValueError: a file of a parent does not match its manifest.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with make_scratch_directory(target) as staging:
        with torch.device("meta"), SkippedInit():  # names and shapes, without weights
            described = SkillNet(plan.config)
        described.vocabulary = plan.vocabulary
        written = [write_config(described, staging)]
        for file, owners in plan.origins.items():
            path = staging / f"{file}{SUFFIX}"
            if file in plan.averaged:
                save_tensors((join or average_weights)(file, owners), path)
            else:
                _copy_file(owners[0], file, path)
            written.append(path.name)
        write_manifest(staging, written, tasks=list_task_files(described), **record)
        # Names and shapes are checked before the model gets its name.
        SkillNet.from_pretrained(staging)
        commit_directory(staging, target)


def _copy_file(parent: MergeParent, file: str, path: Path) -> None:
    _, old, new = parent.sources[file]
    if old == new:
        shutil.copyfile(parent.check_source(file), path)
    else:
        save_tensors(parent.read_weights(file), path)


def average_weights(file: str, parents: Sequence[MergeParent]) -> dict[str, Tensor]:
    """Return the mean of a file over some parents.

    Args:
        file: name in the merged model.
        parents: models that have it.
    """
    read = [parent.read_weights(file) for parent in parents]
    return {
        name: torch.stack([tensors[name].double() for tensors in read]).mean(0).to(value.dtype)
        for name, value in read[0].items()
    }
