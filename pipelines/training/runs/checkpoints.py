"""Checkpoints of a run on disk: find the newest, verify files, load weights."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skillnet.multitask_model import TaskModel
from skillnet.serialization import (
    check_file,
    load_tensors,
    read_manifest,
)
from skillnet_platform import console, storage
from skillnet_platform.errors import UserError

PREFIX = "step-"


@dataclass
class VerifiedCheckpoint:
    """A verified checkpoint on disk.

    Args:
        path: its folder.
        state: content of its ``state.json``.
    """

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps done when the checkpoint was written."""
        return int(self.state["step"])


def find_newest(folder: Path) -> VerifiedCheckpoint | None:
    """Return the newest valid checkpoint of a run, or None; warn about invalid ones.

    Args:
        folder: directory of the checkpoints.
    """
    for path in list_checkpoint_folders(folder):
        try:
            return verify_checkpoint(path)
        except ValueError as error:
            console.print_warning(f"{error}; trying the checkpoint before it")
    return None


def verify_checkpoint(path: str | Path) -> VerifiedCheckpoint:
    """Compare every file of a checkpoint with its manifest.

    Args:
        path: folder of the checkpoint.

    Raises:
        UserError: it is incomplete or corrupt; names the file.
    """
    path = Path(path)
    try:
        manifest = read_manifest(path)
        for name in manifest["files"]:
            check_file(path, name, manifest)
    except ValueError as error:
        raise UserError(f"checkpoint {path} cannot be used: {error}") from None
    # A saved model has no step and no optimizer state, so a run cannot resume from it.
    if "state.json" not in manifest["files"]:
        raise UserError(
            f"{path} is a saved model, not a checkpoint: it has no state.json. Start from it with "
            "init_from, or name a step-* folder"
        )
    state = storage.read_json(path / "state.json")
    step = state.get("step") if isinstance(state, dict) else None
    if type(step) is not int or step < 0 or step_of(path.name) not in (-1, step):
        raise UserError(f"{path / 'state.json'}: expected keys and values with the step")
    return VerifiedCheckpoint(path, state)


@torch.no_grad()
def load_weights(
    path: Path, model: TaskModel, store_weight: Callable[[str, Tensor], None] | None = None
) -> None:
    """Copy a saved model's weights into a model of the same shape.

    Args:
        path: folder of the saved model or checkpoint.
        model: receives the weights.
        store_weight: receives name and value of each weight instead of the model.

    Raises:
        UserError: a file is missing or corrupt, or weights do not fit.
    """
    manifest = read_manifest(path)
    parameters = dict(model.named_parameters())
    # One file at a time: peak memory is one file, not the complete model.
    for file, names in model.files_of().items():
        tensors = load_tensors(check_file(path, f"{file}.safetensors", manifest))
        for name in names:
            if name not in tensors or tensors[name].shape != parameters[name].shape:
                found = tuple(tensors[name].shape) if name in tensors else "missing"
                raise UserError(
                    f"{path}: {name} is {found}, this model has "
                    f"{tuple(parameters[name].shape)}; use the model section of that run"
                )
            if store_weight is not None:
                store_weight(name, tensors[name])
            else:
                parameters[name].copy_(tensors[name])


def list_manifest_files(folder: Path, start: str) -> list[Path]:
    """Return the files of a verified manifest whose names start with ``start``."""
    return [folder / name for name in read_manifest(folder)["files"] if name.startswith(start)]


def list_checkpoint_folders(folder: Path) -> list[Path]:
    """Return the checkpoint folders, newest first, complete or not."""
    found = [p for p in folder.glob(f"{PREFIX}*") if p.is_dir() and step_of(p.name) >= 0]
    return sorted(found, key=lambda path: step_of(path.name), reverse=True)


def step_of(name: str) -> int:
    """Return the step in the name of a checkpoint's folder, or -1."""
    digits = name.removeprefix(PREFIX)
    return int(digits) if digits.isdigit() and digits != name else -1
