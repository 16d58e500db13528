"""Grow a trained model, or take a task off it, while every other weight stays as it is."""

import dataclasses

from skillnet.heads import HEADS
from skillnet.layers import SkillWeights, check_free
from skillnet.model import SkillNet
from skillnet.multitask_model import TaskModel
from skillnet.skills import Task, check_names, check_plan, find_task, nearest
from skillnet.stems import STEMS


def add_skill(model: SkillNet, name: str, init_from: str | None = None) -> SkillNet:
    """Add a skill in place, to every module that carries skills; returns the model.

    Args:
        model: a trained model; its existing tensors are not touched.
        name: the new skill.
        init_from: an existing skill to copy; None draws fresh weights.

    Raises:
        ValueError: a name in use, or an unknown ``init_from``.
    """
    if name in model.config.skills:
        raise ValueError(f"the model already has a skill {name!r}; choose another name")
    known = model.config.skills
    check_names((*known, name), "add_skill")
    if init_from is not None and init_from not in known:
        raise ValueError(f"init_from: unknown skill {init_from!r}{nearest(init_from, known)}")
    for module in model.modules():
        if isinstance(module, SkillWeights) and set(known) <= set(module.weights):
            module.add(name, init_from)
    model.config = dataclasses.replace(model.config, skills=(*known, name))
    return model


def add_task(model: SkillNet, name: str, task: Task) -> SkillNet:
    """Add a task in place: its head, and a stem if it reads a modality that is new.

    Raises:
        ValueError: a name in use, or a plan with an unknown skill.
    """
    if name in model.config.tasks:
        raise ValueError(f"the model already has a task {name!r}; choose another name")
    check_names((*model.config.tasks, name), "add_task")
    check_free(model.heads, name, "task")
    for tower, plan in task.towers.items():
        check_plan(plan, model.config.skills, f"{name}.towers.{tower}")
    some = next(model.parameters())
    head = HEADS[task.objective](model.config, task).to(some.device, some.dtype)
    model.config = dataclasses.replace(model.config, tasks={**model.config.tasks, name: task})
    for stem in task.stems:
        if stem not in model.stems:
            model.stems[stem] = STEMS[stem](model.config).to(some.device, some.dtype)
    model.heads[name] = head
    return model


def remove_task(model: TaskModel, name: str) -> TaskModel:
    """Take a task and its head off, in place; returns the model. Skills and stems stay.

    Raises:
        ValueError: a task that the model does not have.
    """
    find_task(name, model.config.tasks)
    tasks = {task: spec for task, spec in model.config.tasks.items() if task != name}
    model.config = dataclasses.replace(model.config, tasks=tasks)
    model.forget(name)
    return model
