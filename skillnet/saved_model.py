"""Saving a model to a folder, and checks of a saved model before its weights are read.

Only names and shapes of a model matter here, so these functions know no system.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from skillnet.config import SkillNetConfig
from skillnet.serialization import (
    SavableModel,
    check_file,
    read_tensor_shapes,
    write_manifest,
    write_parts,
)
from skillnet.vocabulary import ModelVocabulary
from skillnet_files.commit import commit_directory, make_scratch_directory


def save_model(
    model: SavableModel, path: Path, read_weight: Callable[[str], Tensor] | None = None
) -> None:
    """Write a model atomically; replace an older model at the same path.

    Args:
        model: any system.
        path: directory to write; its parents are created.
        read_weight: see :func:`skillnet.serialization.write_parts`.

    Raises:
        ValueError: the path exists and is not a saved model.
    """
    # A directory without a manifest may hold a user's files. It is never replaced.
    foreign = path.is_dir() and not (path / "manifest.json").is_file() and any(path.iterdir())
    if foreign or (path.exists() and not path.is_dir()):
        raise ValueError(f"{path} exists and is not a saved model; choose another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    with make_scratch_directory(path) as staging:
        write_model(model, staging, read_weight)
        commit_directory(staging, path)


def write_model(
    model: SavableModel, folder: Path, read_weight: Callable[[str], Tensor] | None = None
) -> None:
    """Write the files of a model and their manifest into a directory that nobody reads yet.

    The manifest lists the weight files of each task, so that one task can be downloaded alone.

    Args:
        model: any system.
        folder: existing directory.
        read_weight: see :func:`skillnet.serialization.write_parts`.
    """
    written = write_parts(model, folder, read_weight)
    write_manifest(folder, written, tasks=list_task_files(model))


def list_task_files(model: SavableModel) -> dict[str, list[str]]:
    """Return task -> names of the weight files that it reads.

    Args:
        model: any system.
    """
    return {
        task: sorted(f"{file}.safetensors" for file in model.files_of(task))
        for task in model.config.tasks
    }


def require_output_names(folder: Path, config: SkillNetConfig, vocabulary: ModelVocabulary) -> None:
    """Require as many names as outputs for each named task of a saved model.

    Args:
        folder: directory of the model, for the message.
        config: settings of the model.
        vocabulary: tokenizer digest and output names of the model.

    Raises:
        ValueError: a task has another number of names.
    """
    for task, names in vocabulary.restrict_to(config.tasks).outputs.items():
        if len(names) != config.tasks[task].outputs:
            raise ValueError(
                f"{folder / 'config.json'}: vocabulary.outputs.{task} has {len(names)} names, the "
                f"task has {config.tasks[task].outputs} outputs"
            )


def require_saved_shapes(folder: Path, model: SavableModel, manifest: dict[str, Any]) -> None:
    """Require that the headers of a model's files name its weights and shapes.

    Args:
        folder: directory of the saved model.
        model: built from its configuration; its weights are not read.
        manifest: parsed ``manifest.json`` of the folder.

    Raises:
        ValueError: a weight is missing, unknown, or has another shape.
    """
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    names_of = model.files_of()
    # Hashing takes half of the time to load a model, and runs without Python's global lock.
    with ThreadPoolExecutor() as pool:
        files = [f"{file}.safetensors" for file in names_of]
        paths = list(pool.map(lambda file: check_file(folder, file, manifest), files))
    for path, names in zip(paths, names_of.values(), strict=True):
        found = read_tensor_shapes(path)
        if found.keys() != set(names):
            raise ValueError(f"{path} holds other weights than its config says")
        for name in names:
            if found[name] != wanted[name]:
                raise ValueError(
                    f"{path} does not fit its config: {name} is {found[name]}, "
                    f"expected {wanted[name]}"
                )
