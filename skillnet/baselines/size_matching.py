"""How wide a baseline must be to cost as much as a SkillNet: docs/baselines.md has the rules.

Compared are the Transformer layers. Heads, and for the dense and mixture-of-experts baselines
stems too, are the same on both sides and cancel out.

The mean runs over the five default tasks, with the study's own plans where it has them, and not
over the tasks that a configuration happens to train: so the pretraining and the fine-tuning of a
study build baselines of one size.
"""

import dataclasses
from collections.abc import Iterable

import torch

from skillnet.config import SkillNetConfig
from skillnet.encoder import Encoder, EncoderLayer
from skillnet.skills import SkillPlan, Task, default_tasks

#: How far a width may be off so that it divides by a power of two, which products like.
TOLERANCE = 0.005


def reference_tasks(config: SkillNetConfig) -> dict[str, Task]:
    """The tasks over which costs are averaged.

    The five default ones as far as the model has their skills; if it has none, all tasks of the
    configuration that are not masked modelling; if there are none either, all.
    """
    defaults = {name: config.tasks.get(name, task) for name, task in default_tasks().items()}
    known = {n: task for n, task in defaults.items() if set(task.skills) <= set(config.skills)}
    measured = {n: task for n, task in config.tasks.items() if task.objective != "masked"}
    return known or measured or config.tasks


def towers(config: SkillNetConfig) -> float:
    """Mean number of towers of a task: how many models a specialist of it consists of."""
    tasks = reference_tasks(config)
    return sum(len(task.towers) for task in tasks.values()) / len(tasks)


def activated(config: SkillNetConfig) -> float:
    """Mean number of parameters of SkillNet's layers that a task activates."""
    encoder = _encoder(config)
    tasks = reference_tasks(config)
    return sum(_count(encoder, task.skills) for task in tasks.values()) / len(tasks)


def total(config: SkillNetConfig) -> int:
    """Number of parameters of SkillNet's layers."""
    return _count(_encoder(config), config.skills)


def executed_width(config: SkillNetConfig) -> float:
    """Feed-forward width at which a dense encoder does as many operations per example.

    Attention costs the same however many skills are merged into it, so it is the mean executed
    width of SkillNet's feed-forward layers, over layers and the tokens of the longest examples.
    """
    layers = [layer for layer in _encoder(config).layers if isinstance(layer, EncoderLayer)]
    work = count = 0.0
    for task in reference_tasks(config).values():
        for plan in task.towers.values():
            tokens = longest(config, plan)
            active = (len(plan.skills) if layer.feedforward_skills else 1 for layer in layers)
            work += tokens * config.ffn_dim * sum(active) / len(layers)
            count += tokens
    return work / count


def longest(config: SkillNetConfig, plan: SkillPlan) -> int:
    """Tokens of the longest example that a tower reads."""
    if plan.modality in ("text", "code"):
        return config.max_tokens
    if plan.modality == "sound":
        return -(-config.max_frames // config.mel_stack)
    if plan.modality == "image":
        return (config.image_size // config.patch_size) ** 2
    frames, height, width = config.tubelet
    across = (config.video_size // height) * (config.video_size // width)
    return (config.video_frames // frames) * across


def one_skill(config: SkillNetConfig, name: str, hidden: int) -> SkillNetConfig:
    """The configuration with one skill instead of several, active in every tower and layer."""
    tasks = {
        task: dataclasses.replace(
            spec, towers={t: SkillPlan((name,), plan.modality) for t, plan in spec.towers.items()}
        )
        for task, spec in config.tasks.items()
    }
    return dataclasses.replace(
        config,
        skills=(name,),
        tasks=tasks,
        ffn_dim=hidden,
        skill_modules="both",
        skill_every=1,
    )


def solve_width(wanted: float, fixed: float, each: float, where: str) -> int:
    """The width h at which ``fixed + each * h`` is ``wanted``; see :func:`rounded`.

    Raises:
        ValueError: nothing is left for the feed-forward layer.
    """
    if wanted < fixed + each:
        raise ValueError(
            f"{where}: SkillNet's {wanted:.0f} parameters are fewer than those of the other "
            f"layers, {fixed:.0f}; set {where} yourself"
        )
    return rounded((wanted - fixed) / each)


def rounded(width: float) -> int:
    """The nearest whole number, a multiple of the largest power of two that changes little."""
    for step in (64, 32, 16, 8, 4, 2):
        near = round(width / step) * step
        if near and abs(near - width) <= TOLERANCE * width:
            return near
    return max(round(width), 1)


def _encoder(config: SkillNetConfig) -> Encoder:
    # Shapes alone: no memory, and no number drawn.
    with torch.device("meta"):
        return Encoder(config)


def _count(encoder: Encoder, skills: Iterable[str]) -> int:
    """Parameters of an encoder that some active skills read."""
    names = {*skills, "shared"}
    return sum(
        p.numel()
        for name, p in encoder.named_parameters()
        if ".weights." not in name or name.rpartition(".")[2] in names
    )
