"""Comparison of a bundle's manifest with its model: tasks, hashes, tokenizer and names.

``serving.json`` describes the bundle and ``manifest.json`` the saved model in it. Either may come
from elsewhere. :mod:`pipelines.serving.bundle` calls the checks.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.data.tokenizer.guarded_loader import largest_token_id
from pipelines.training.runs.bundle_manifest import BUNDLE_MANIFEST, REMEDY
from pipelines.training.runs.vocabulary_match import TOKENIZER_FILE
from skillnet.config import SkillNetConfig
from skillnet.multitask_model import TaskModel
from skillnet.objectives.base import find_objective
from skillnet.serialization import read_manifest
from skillnet_platform.errors import UserError

#: Manifest of the saved model in a bundle.
MODEL_MANIFEST = "manifest.json"


def check_recorded_hashes(folder: Path, manifest: Mapping[str, Any]) -> set[str]:
    """Check that both manifests of a bundle record the same hashes of the model's files.

    With equal records, one pass over the weights checks both.

    Args:
        folder: directory of the bundle; ``manifest.json`` in it fits its hash.
        manifest: content of ``serving.json``.

    Returns:
        Names of the model's files.

    Raises:
        UserError: a file of the model is not listed, or with another hash.
    """
    recorded = read_manifest(folder)["files"]
    for name in sorted(recorded):
        if manifest["files"].get(name) != recorded[name]["sha256"]:
            raise UserError(
                f"{folder / BUNDLE_MANIFEST}: files.{name} is not the hash in {MODEL_MANIFEST}; "
                f"{REMEDY}"
            )
    return set(recorded)


def check_tasks(path: Path, manifest: Mapping[str, Any], config: SkillNetConfig) -> None:
    """Check that a bundle describes the tasks and outputs of its model.

    Args:
        path: location of the manifest.
        manifest: content of ``serving.json``.
        config: settings of the model.

    Raises:
        UserError: a task is missing, or has another number of names than outputs.
    """
    if manifest["tasks"].keys() != config.tasks.keys():
        raise UserError(
            f"{path}: tasks are {', '.join(manifest['tasks'])}; the model has "
            f"{', '.join(config.tasks)}; {REMEDY}"
        )
    for task, spec in config.tasks.items():
        names = manifest["tasks"][task]["names"]
        if find_objective(spec.objective).listed and len(names) != spec.outputs:
            raise UserError(
                f"{path}: tasks.{task}.names has {len(names)} names; the model has {spec.outputs} "
                f"outputs; {REMEDY}"
            )


def check_bundle_vocabulary(
    folder: Path, manifest: Mapping[str, Any], tokenizer: Any, model: TaskModel
) -> None:
    """Check that the tokenizer and the names of a bundle are those of its model.

    Args:
        folder: directory of the bundle.
        manifest: content of ``serving.json``.
        tokenizer: text encoder of the bundle.
        model: module with the weights of the bundle.

    Raises:
        UserError: another tokenizer, a token beyond the vocabulary of the model, or other names.
    """
    path, size = folder / TOKENIZER_FILE, model.config.vocab_size
    largest = largest_token_id(tokenizer)
    if largest >= size:
        raise UserError(
            f"{path}: it has the token id {largest}; the model has {size} tokens; use "
            "the tokenizer of its training"
        )
    expected, found = model.vocabulary.tokenizer, manifest["files"][TOKENIZER_FILE]
    if expected is not None and found != expected:
        raise UserError(
            f"{path}: sha256 {found}; the model was trained with the tokenizer {expected}; {REMEDY}"
        )
    for task, names in model.vocabulary.outputs.items():
        if list(names) != manifest["tasks"][task]["names"]:
            raise UserError(
                f"{folder / BUNDLE_MANIFEST}: tasks.{task}.names are not those of the model; "
                f"{REMEDY}"
            )
