"""Skills that start as copies of a dense model: a dense run, or a checkpoint of a library.

:data:`DENSE_START` is the entry point of the group ``skillnet.weights``
(:class:`pipelines.training.loop.init_from.WeightReader`). :func:`find_needed_settings` says which
settings a run lacks to compute what the dense model computes, and :func:`complete_template` writes
them into the file of ``skillnet init-task --from``.
"""

import shlex
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from pipelines.data.preprocessing.task_template import TaskTemplate
from pipelines.data.transforms.sound import MELS
from pipelines.training.config.run import FinetuneConfig, PretrainConfig
from pipelines.training.loop.init_from import (
    check_init_settings,
    find_origin,
    format_option_value,
    format_options,
)
from pipelines.training.loop.resolved_run import ResolvedRun, resolve_run
from pipelines.training.runs.model_source import resolve_model
from skillnet.config import SkillNetConfig
from skillnet.modality import list_modalities
from skillnet.model import SkillNet
from skillnet.multitask_model import TaskModel
from skillnet.objectives.base import find_objective
from skillnet.objectives.heads import head_class
from skillnet.serialization import read_about, read_config, read_manifest
from skillnet.skill_copies import (
    DENSE_SKILL,
    LAYERS_TASK,
    copy_to_skills,
    find_inseparable_skills,
    is_difference,
    separate_skills,
)
from skillnet.skills import Task
from skillnet_hf.imported_weights import import_weights
from skillnet_platform import config as configuration
from skillnet_platform.errors import UserError

#: Peak rate of training that keeps what the weights know (docs/results/published-start.md).
START_LR = 1e-4
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
    return needed | dict.fromkeys(f"{s}.{n}" for n in masked for s in ("tasks", "model.tasks"))


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
        f"{key} {format_option_value(mine[key])}"
        for key in (name.removeprefix("model.") for name in needed)
        if key in mine
    ]
    found += [f"{name} beside a class token" for name in left_out]
    return (
        f"{location} has other layers or inputs than this run ({', '.join(found)}); "
        f"give {format_options(needed)}"
    )


def format_corpus_sizes(needed: Mapping[str, Any], corpora: Iterable[tuple[str, str]]) -> str:
    """Return the options that prepare corpora of other sizes; "" if none is needed.

    Args:
        needed: see :func:`find_needed_settings`.
        corpora: names and modalities.
    """
    names = dict.fromkeys(corpora)
    return " ".join(
        f"--options.{name}.{size.option} {needed[f'model.{size.key}']}"
        for modality in list_modalities()
        for size in modality.sizes
        if not size.is_limit and f"model.{size.key}" in needed
        for name, own in names
        if own == modality.name
    )


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


def complete_template(template: TaskTemplate, address: str) -> TaskTemplate:
    """Return a template whose task starts from existing weights.

    Args:
        template: task that starts from random weights.
        address: dense run, folder of a checkpoint, or ``owner/name`` on the Hugging Face hub.

    Raises:
        UserError: there are no such weights, no setting makes them fit, or the corpus was prepared
            for other weights; names what to prepare.
    """
    given = str(Path(address).absolute()) if Path(address).is_dir() else address
    settings = template.settings | {"init_from": given, "training": {"lr": START_LR}}
    run = _resolve_template(replace(template, settings=settings))
    location = f"--from {find_origin(str(run.config.init_from))}"
    source = resolve_model(str(run.config.init_from))
    manifest = read_manifest(source.weights)
    system = read_about(source.weights, manifest).get("system", "skillnet")
    if not DENSE_START.reads_system(system, run.config):
        raise UserError(
            f"{location} holds a model of the system {system!r}, whose run states its settings. "
            "Give a dense run or a checkpoint of transformers or timm, or add the task with "
            "skillnet grow"
        )
    start, _, _ = read_config(source.weights, manifest)
    describe_needed_settings(run.config, start, location)  # raises if no setting makes it fit
    needed = find_needed_settings(run.config, start)
    model = template.settings["model"] | {
        key.removeprefix("model."): value
        for key, value in needed.items()
        if key.startswith("model.") and not key.startswith("model.tasks.")
    }
    made = replace(template, settings=settings | {"model": model})
    complete = _resolve_template(made)
    check_init_settings(complete.config, complete.opened)
    *prepare, train = template.commands
    if prepare:
        task = run.config.model.tasks[template.name]
        stems = {stem for each in start.tasks.values() for stem in each.stems}
        modalities = [plan.modality for plan in task.towers.values()]
        sizes = format_corpus_sizes(needed, [(template.corpus, each) for each in modalities])
        words = [*prepare, *([sizes] if sizes else [])]
        if "token" in stems & set(task.stems):
            words.append(f"--tokenizer {shlex.quote(given)}")
        made = replace(made, commands=(" ".join(words), train))
    return made


def _resolve_template(template: TaskTemplate) -> ResolvedRun:
    """Return the run that the command of a template trains."""
    is_masked = not find_objective(template.objective).has_labels
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(template.to_yaml())
        file.flush()
        words = ["--config", "small", "--config", file.name]
        config: Any = configuration.parse_config(
            PretrainConfig if is_masked else FinetuneConfig, words, "skillnet init-task"
        )
    return resolve_run(config.joint() if is_masked else config)


class DenseStart:
    """Reader of the group ``skillnet.weights`` for dense models and checkpoints of libraries."""

    import_weights = staticmethod(import_weights)
    complete_template = staticmethod(complete_template)
    describe_settings = staticmethod(describe_needed_settings)

    def reads_system(self, system: str, config: FinetuneConfig) -> bool:
        """Return whether a run gives its skills copies of a model of a system."""
        return system == DENSE_SKILL and config.system == SkillNet.system

    def describe_sizes(
        self, config: FinetuneConfig, source: SkillNetConfig, corpora: Iterable[tuple[str, str]]
    ) -> str:
        """Return the options that prepare corpora for a model; see :func:`format_corpus_sizes`."""
        return format_corpus_sizes(find_needed_settings(config, source), corpora)

    def load_copies(
        self, config: FinetuneConfig, model: TaskModel, weights: Mapping[str, Tensor]
    ) -> tuple[set[str], list[str]]:
        """Give every skill a copy; see ``WeightReader.load_copies``."""
        fresh = model.load_partial(copy_to_skills(weights, model))
        # A difference of zero is a copy too.
        return {name for name in fresh if not is_difference(name)}, add_noise(config, model)


DENSE_START = DenseStart()
