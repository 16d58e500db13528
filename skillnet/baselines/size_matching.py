"""Width of a baseline that costs as much as a SkillNet; docs/baselines.md has the rules.

Only Transformer layers are compared. Heads, and for the dense and mixture-of-experts baselines
also stems, are equal on both sides and cancel out.

The mean is over the five default tasks, with the study's plans where it has them, and not over
the tasks that a run trains. Pretraining and fine-tuning of a study therefore build baselines of
one size.
"""

import dataclasses
from collections.abc import Iterable

import torch

from skillnet.config import SkillNetConfig
from skillnet.encoder import Encoder, EncoderLayer
from skillnet.skills import SkillPlan, Task, default_tasks

#: Largest relative change of a width that makes it a multiple of a power of two (faster products).
TOLERANCE = 0.005


def reference_tasks(config: SkillNetConfig) -> dict[str, Task]:
    """Return the tasks over which costs are averaged.

    These are the five default tasks whose skills the model has. If there are none, all tasks that
    are not masked modelling, and otherwise all tasks.
    """
    defaults = {name: config.tasks.get(name, task) for name, task in default_tasks().items()}
    known = {n: task for n, task in defaults.items() if set(task.skills) <= set(config.skills)}
    measured = {n: task for n, task in config.tasks.items() if task.objective != "masked"}
    return known or measured or config.tasks


def mean_num_towers(config: SkillNetConfig) -> float:
    """Return the mean number of towers of a task: the number of encoders of its specialist."""
    tasks = reference_tasks(config)
    return sum(len(task.towers) for task in tasks.values()) / len(tasks)


def mean_activated_params(config: SkillNetConfig) -> float:
    """Return the mean number of parameters of SkillNet's layers that a task activates."""
    encoder = _encoder(config)
    tasks = reference_tasks(config)
    return sum(_count(encoder, task.skills) for task in tasks.values()) / len(tasks)


def total_params(config: SkillNetConfig) -> int:
    """Return the number of parameters of SkillNet's layers."""
    return _count(_encoder(config), config.skills)


def executed_width(config: SkillNetConfig) -> float:
    """Return the feed-forward width of a dense encoder with as many operations per example.

    The cost of attention does not depend on the number of merged skills. The result is therefore
    the mean executed width of SkillNet's feed-forward layers, over layers and tokens of the longest
    examples.
    """
    layers = [layer for layer in _encoder(config).layers if isinstance(layer, EncoderLayer)]
    work = count = 0.0
    for task in reference_tasks(config).values():
        for plan in task.towers.values():
            tokens = max_tokens(config, plan)
            active = (len(plan.skills) if layer.feedforward_skills else 1 for layer in layers)
            work += tokens * config.ffn_dim * sum(active) / len(layers)
            count += tokens
    return work / count


def max_tokens(config: SkillNetConfig, plan: SkillPlan) -> int:
    """Return the number of tokens of the longest input of a tower.

    Args:
        config: sizes of the inputs.
        plan: plan of the tower.
    """
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
    """Return the configuration with one skill, active in every tower and layer.

    Args:
        config: configuration of the study.
        name: of the skill.
        hidden: feed-forward width.
    """
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
    """Solve ``fixed + each * h = wanted`` for the width h, rounded by :func:`round_width`.

    Args:
        wanted: number of parameters.
        fixed: parameters that do not depend on the width.
        each: parameters per unit of width.
        where: option of the width, for the message.

    Raises:
        ValueError: no parameters are left for the feed-forward layer.
    """
    if wanted < fixed + each:
        raise ValueError(
            f"{where}: SkillNet's {wanted:.0f} parameters are fewer than those of the other "
            f"layers, {fixed:.0f}; set {where} explicitly"
        )
    return round_width((wanted - fixed) / each)


def round_width(width: float) -> int:
    """Round to the multiple of the largest power of two that changes the width by at most 0.5 %."""
    # Matrix kernels are fastest at multiples of large powers of two.
    for step in (64, 32, 16, 8, 4, 2):
        near = round(width / step) * step
        if near and abs(near - width) <= TOLERANCE * width:
            return near
    return max(round(width), 1)


def _encoder(config: SkillNetConfig) -> Encoder:
    # The meta device has shapes only: no memory is allocated and no random number is drawn.
    with torch.device("meta"):
        return Encoder(config)


def _count(encoder: Encoder, skills: Iterable[str]) -> int:
    """Count the parameters of an encoder that a set of active skills reads."""
    names = {*skills, "shared"}
    return sum(
        p.numel()
        for name, p in encoder.named_parameters()
        if ".weights." not in name or name.rpartition(".")[2] in names
    )
