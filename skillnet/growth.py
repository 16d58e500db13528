"""Growth of a trained model: add skills and tasks, or remove a task, without other changes."""

import dataclasses

from skillnet.modality import find_stem
from skillnet.model import SkillNet
from skillnet.multitask_model import TaskModel
from skillnet.objectives.heads import build_head
from skillnet.skill_weights import SkillWeights, require_unused_name
from skillnet.skills import Task, check_names, check_plan, find_task, nearest_hint


def add_skill(model: SkillNet, name: str, init_from: str | None = None) -> SkillNet:
    """Add a skill in place to every module that has skills.

    Args:
        model: a trained model; existing tensors are not changed.
        name: key of the new skill in ``model.skills``.
        init_from: existing skill to copy; None draws random weights.

    Returns:
        The same model.

    Raises:
        ValueError: the name is in use, or ``init_from`` is unknown.
    """
    if name in model.config.skills:
        raise ValueError(f"the model already has a skill {name!r}; choose another name")
    known = model.config.skills
    check_names((*known, name), "add_skill")
    if init_from is not None and init_from not in known:
        raise ValueError(f"init_from: unknown skill {init_from!r}{nearest_hint(init_from, known)}")
    for module in model.modules():
        # Shared layers have one weight, named "shared", and get no new skill.
        if isinstance(module, SkillWeights) and set(known) <= set(module.names):
            module.add(name, init_from)
    model.config = dataclasses.replace(model.config, skills=(*known, name))
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
        ValueError: a plan activates the skill.
    """
    # Replaced first: the configuration rejects plans with a skill that it lacks.
    kept = tuple(skill for skill in model.config.skills if skill != name)
    model.config = dataclasses.replace(model.config, skills=kept)
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
