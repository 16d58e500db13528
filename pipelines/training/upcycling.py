"""Start of a run from a dense encoder: our dense baseline, or a checkpoint of a library.

:func:`import_checkpoint` converts a checkpoint of transformers or timm to a saved dense model.
:func:`check_dense_source` compares its layers with those of the run.
:mod:`pipelines.training.init_from` calls both.
"""

import hashlib
import re
from pathlib import Path
from typing import Any

from pipelines.config.run import FinetuneConfig
from pipelines.tokenizer.conversion import map_token_ids
from skillnet.baselines.hf_checkpoints import find_checkpoint
from skillnet.config import SkillNetConfig
from skillnet.model import SkillNet
from skillnet.multitask_model import TaskModel
from skillnet.upcycling.encoder_families import DENSE_SKILL
from skillnet.upcycling.library_checkpoint import (
    LAYERS_TASK,
    convert_checkpoint,
    is_library_checkpoint,
)
from skillnet.upcycling.skill_copies import find_inseparable_skills, separate_skills
from skillnet.vocabulary import ModelVocabulary
from skillnet_platform import config as configuration
from skillnet_platform import storage
from skillnet_platform.errors import UserError

#: ``owner/name`` of a model of the Hugging Face hub.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
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


def find_library_checkpoint(address: str) -> Path | None:
    """Return the folder of a library's checkpoint that ``--from`` names; None if it names none.

    Args:
        address: a folder, or ``owner/name`` of a model of the Hugging Face hub, which is
            downloaded if the local cache lacks it.

    Raises:
        UserError: the hub has no such model, or it has no safetensors file.
    """
    path = Path(address).expanduser()
    if path.is_dir():
        try:
            return find_checkpoint(address, False) if is_library_checkpoint(path) else None
        except ValueError as error:
            raise UserError(f"--from {address}: {error}") from None
    is_known = path.exists() or (storage.run_root() / address).exists()
    if is_known or not _HUB_ID.fullmatch(address):
        return None
    try:
        return find_checkpoint(address, True)
    except ValueError as error:
        raise UserError(
            f"--from {address}: no folder and no run in {storage.run_root()} has this name; {error}"
        ) from None


def import_checkpoint(folder: Path, run_dir: str) -> Path:
    """Convert a library's checkpoint to a saved dense model below ``run_dir``.

    The ids of a tokenizer in the folder are mapped as ``skillnet prepare --tokenizer`` maps them.

    Args:
        folder: of the checkpoint.
        run_dir: directory of runs.

    Returns:
        Folder of the saved model.

    Raises:
        UserError: the checkpoint does not fit SkillNet's layers.
    """
    found = [*sorted(folder.glob("*.safetensors")), *sorted(folder.glob("*.json"))]
    names = [path for path in found if path.is_file()]
    digest = hashlib.sha256("".join(map(storage.sha256_file, names)).encode()).hexdigest()
    target = Path(run_dir) / ".starts" / f"{folder.name}-{digest[:16]}"
    if (target / "manifest.json").is_file():
        return target
    tokenizer, rows = None, None
    if (folder / "tokenizer.json").is_file():
        text, rows = map_token_ids(folder)
        tokenizer = hashlib.sha256(text.encode("utf-8")).hexdigest()
    try:
        model = convert_checkpoint(folder, rows)
    except ValueError as error:
        raise UserError(str(error)) from None
    model.vocabulary = ModelVocabulary(tokenizer if "token" in model.stems else None)
    target.parent.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(target)
    return target


def starts_skills(system: str, config: FinetuneConfig) -> bool:
    """Return whether a run gives its skills copies of a dense model.

    Args:
        system: of the initial weights.
        config: of the run.
    """
    return system == DENSE_SKILL and config.system == SkillNet.system


def check_dense_source(config: FinetuneConfig, source: SkillNetConfig, location: str) -> None:
    """Raise UserError, with all settings to give, if a dense model computes other layers.

    Args:
        config: of the run.
        source: configuration of the dense model.
        location: option that names it.
    """
    if source.skills != (DENSE_SKILL,):
        raise UserError(
            f"{location} has a feed-forward network per modality; a skill can start from a dense "
            "model with options.feedforward shared"
        )
    stems = {
        stem for name, task in source.tasks.items() if name != LAYERS_TASK for stem in task.stems
    }
    ours = {stem for task in config.model.tasks.values() for stem in task.stems}
    keys = [*_LAYER_KEYS, *(key for stem in sorted(stems & ours) for key in _STEM_KEYS[stem])]
    theirs, mine = configuration.to_dict(source), configuration.to_dict(config.model)
    differing = [key for key in keys if theirs[key] != mine[key]]
    if differing:
        options = " ".join(f"--model.{key} {_format_value(theirs[key])}" for key in differing)
        found = ", ".join(f"{key} {_format_value(mine[key])}" for key in differing)
        raise UserError(
            f"{location} has other layers or inputs than this run ({found}); give {options}"
        )


def _format_value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "")


def add_noise(config: FinetuneConfig, model: TaskModel) -> list[str]:
    """Add noise to copies that training would keep equal; return a line for each of them.

    Args:
        config: of the run; ``init_noise`` is the relative deviation.
        model: whose skills are copies.
    """
    plans = [
        plan.skills for name in config.trained for plan in config.model.tasks[name].towers.values()
    ]
    if config.model.skill_rank:
        return []  # the random factors of the differences separate the skills
    groups = find_inseparable_skills(plans, model.config.skills)
    changed = separate_skills(model, groups, config.init_noise, config.seed)
    return [
        f"{skill}: copied with noise of {config.init_noise:g}, because it is always active "
        f"together with {group[0]}"
        for group in groups
        for skill in group[1:]
        if skill in changed
    ]
