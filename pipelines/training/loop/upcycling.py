"""Start of a run from a dense encoder: our dense baseline, or a model that a plug-in converted.

:func:`describe_needed_settings` compares its layers with those of the run.
:mod:`pipelines.training.loop.init_from` calls it.
"""

import json
from collections.abc import Mapping
from itertools import chain
from typing import Any

from pipelines.data.transforms.sound import MELS
from pipelines.training.config.run import FinetuneConfig
from skillnet.config import SkillNetConfig
from skillnet.model import SkillNet
from skillnet.multitask_model import TaskModel
from skillnet.objectives.base import find_objective
from skillnet.objectives.heads import head_class
from skillnet.skill_copies import (
    DENSE_SKILL,
    LAYERS_TASK,
    find_inseparable_skills,
    separate_skills,
)
from skillnet.skills import Task
from skillnet_platform import config as configuration
from skillnet_platform.errors import UserError

#: Noise on copies that training would keep equal, because their skills are always active together:
#: its deviation, relative to that of the weights.
INIT_NOISE = 0.01
#: Keys of the layers that decide what a dense encoder computes.
_LAYER_KEYS = (
    "dim",
    "num_layers",
    "num_heads",
    "ffn_dim",
    "bias",
    "norm_position",
    "norm_eps",
    "stem_norm",
)
#: Stem -> keys that its weights and their meaning depend on.
_STEM_KEYS = {
    "token": ("vocab_size", "bigram_buckets"),
    "patch": ("patch_size", "class_token"),
    "log_mel": ("n_mels", "mel_stack"),
    "tubelet": ("tubelet", "video_motion"),
}


def starts_skills(system: str, config: FinetuneConfig) -> bool:
    """Return whether a run gives its skills copies of a dense model.

    Args:
        system: registered kind of the initial weights.
        config: settings of the run.
    """
    return system == DENSE_SKILL and config.system == SkillNet.system


def find_needed_settings(config: FinetuneConfig, source: SkillNetConfig) -> dict[str, Any]:
    """Return the settings that a run lacks to compute what a dense model computes.

    Args:
        config: settings of the run.
        source: configuration of the dense model.

    Returns:
        Dotted key -> value to give; without the settings that the run has already. A configuration
        with all of them is valid.
    """
    # A class token is no patch, so its model cannot predict the patches of an image.
    masked = [name for name, task in config.model.tasks.items() if _masks_images(task)]
    if not (source.class_token and "patch" in _stems_of(source)):
        masked = []
    ours = {name: task for name, task in config.model.tasks.items() if name not in masked}
    common = _stems_of(source) & {stem for task in ours.values() for stem in task.stems}
    keys = [*_LAYER_KEYS, *(key for stem in sorted(common) for key in _STEM_KEYS[stem])]
    keys += _find_head_keys(source.tasks, ours)
    wanted = {key: getattr(source, key) for key in keys}
    model = config.model
    if "token" in common and model.max_tokens > source.max_tokens:
        wanted["max_tokens"] = source.max_tokens
    if "log_mel" in common:
        count = -(-source.max_frames // source.mel_stack)
        if -(-model.max_frames // source.mel_stack) > count:
            wanted["max_frames"] = source.max_frames
    # Pixels of other sizes are interpolated, if whole patches cover them.
    if "patch" in common and model.image_size % source.patch_size:
        wanted["image_size"] = source.image_size
    if "tubelet" in common:
        frames, height, width = source.tubelet
        if model.video_frames % frames:
            wanted["video_frames"] = source.video_frames
        if model.video_size % height or model.video_size % width:
            wanted["video_size"] = source.video_size
    needed = {f"model.{k}": value for k, value in wanted.items() if value != getattr(model, k)}
    left_out = (f"{section}.{name}" for name in masked for section in ("tasks", "model.tasks"))
    return needed | dict.fromkeys(left_out)


def _stems_of(source: SkillNetConfig) -> set[str]:
    tasks = (task for name, task in source.tasks.items() if name != LAYERS_TASK)
    return {stem for task in tasks for stem in task.stems}


def _masks_images(task: Task) -> bool:
    return find_objective(task.objective).hides_inputs and "patch" in task.stems


def _find_head_keys(theirs: Mapping[str, Task], ours: Mapping[str, Task]) -> list[str]:
    """Return the keys that the heads of common tasks depend on, beside those of their stems."""
    keys = (
        head_class(task).config_keys(task)
        for name, task in ours.items()
        if name in theirs and theirs[name].objective == task.objective
    )
    return sorted(set(chain.from_iterable(keys)))


def describe_needed_settings(config: FinetuneConfig, source: SkillNetConfig, location: str) -> str:
    """Return how a run differs from a dense model, with all settings to give; "" if it fits.

    Args:
        config: settings of the run.
        source: configuration of the dense model.
        location: option that names it.

    Raises:
        UserError: no setting makes it fit; states the reason.
    """
    if source.skills != (DENSE_SKILL,):
        raise UserError(
            f"{location} has a feed-forward network per modality; a skill can start from a dense "
            "model with options.feedforward shared"
        )
    needed = find_needed_settings(config, source)
    left_out = [key.removeprefix("tasks.") for key in needed if key.startswith("tasks.")]
    if left_out and set(left_out) == set(config.tasks):
        raise UserError(
            f"{location} has a class token, and {', '.join(left_out)} predicts the patches of an "
            "image. Give a checkpoint without a class token, or another task"
        )
    if needed.get("model.n_mels", MELS) != MELS:
        raise UserError(
            f"{location} reads {source.n_mels} log-mel bins, and prepared sound has {MELS}. "
            f"Give a checkpoint of {MELS} bins"
        )
    if not needed:
        return ""
    mine = configuration.to_dict(config.model)
    found = [
        f"{key} {_format_value(mine[key])}"
        for key in (name.removeprefix("model.") for name in needed)
        if key in mine
    ]
    found += [f"{name} beside a class token" for name in left_out]
    return (
        f"{location} has other layers or inputs than this run ({', '.join(found)}); "
        f"give {format_options(needed)}"
    )


def format_options(settings: Mapping[str, Any]) -> str:
    """Return settings as words of a command line.

    Args:
        settings: dotted key -> value.
    """
    return " ".join(f"--{key} {_format_value(value)}" for key, value in settings.items())


def _format_value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{','.join(map(str, value))}]"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def add_noise(config: FinetuneConfig, model: TaskModel) -> list[str]:
    """Add noise to copies that training would keep equal; return a line for each of them.

    Args:
        config: settings of the run.
        model: whose skills are copies.
    """
    plans = [
        plan.skills for name in config.trained for plan in config.model.tasks[name].towers.values()
    ]
    if config.model.skill_rank:
        return []  # the random factors of the differences separate the skills
    groups = find_inseparable_skills(plans, model.config.skills)
    changed = separate_skills(model, groups, INIT_NOISE, config.seed)
    return [
        f"{skill}: copied with noise of {INIT_NOISE:g}, because it is always active "
        f"together with {group[0]}"
        for group in groups
        for skill in group[1:]
        if skill in changed
    ]
