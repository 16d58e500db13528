"""TODO: pipelines.runs.checkpoints."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

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
class Checkpoint:
    """A whole checkpoint on disk: where, and its ``state.json``."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps done when it was written."""
        return int(self.state["step"])


def newest(folder: Path, most: int | None = None) -> Checkpoint | None:
    """The newest whole checkpoint of a run, or none. Names those that it has to skip.

    Args:
        folder: of the checkpoints.
        most: look at none of more steps than this.
    """
    for path in _folders(folder):
        if most is not None and step_of(path.name) > most:
            continue
        try:
            return verify(path)
        except ValueError as problem:
            console.warn(f"{problem}; trying the checkpoint before it")
    return None


def verify(path: str | Path) -> Checkpoint:
    """Compare every file of a checkpoint with its manifest.

    Raises:
        UserError: it is incomplete or altered; names the file.
    """
    path = Path(path)
    try:
        manifest = read_manifest(path)
        for name in manifest["files"]:
            check_file(path, name, manifest)
    except ValueError as problem:
        raise UserError(f"checkpoint {path} cannot be used: {problem}") from None
    if "state.json" not in manifest["files"]:
        raise UserError(
            f"{path} is a saved model, not a checkpoint: it has no state.json. Start from it with "
            "init_from, or name a step-* folder"
        )
    state = storage.read_json(path / "state.json")
    step = state.get("step") if isinstance(state, dict) else None
    if type(step) is not int or step < 0 or step_of(path.name) not in (-1, step):
        raise UserError(f"{path / 'state.json'}: expected keys and values with the step")
    return Checkpoint(path, state)


@torch.no_grad()
def load_weights(path: Path, model: TaskModel) -> None:
    """Copy a saved model's weights into a model of the same shape.

    Raises:
        UserError: a file that is missing or altered, or weights that do not fit.
    """
    manifest = read_manifest(path)
    parameters = dict(model.named_parameters())
    for file, names in model.files_of().items():
        tensors = load_tensors(check_file(path, f"{file}.safetensors", manifest))
        for name in names:
            if name not in tensors or tensors[name].shape != parameters[name].shape:
                found = tuple(tensors[name].shape) if name in tensors else "missing"
                raise UserError(
                    f"{path}: {name} is {found}, this model has "
                    f"{tuple(parameters[name].shape)}; use the model section of that run"
                )
            parameters[name].copy_(tensors[name])


def _listed(folder: Path, start: str) -> list[Path]:
    """Files of the manifest, and so verified, whose names start so."""
    return [folder / name for name in read_manifest(folder)["files"] if name.startswith(start)]


def _folders(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first, whole or not."""
    found = [p for p in folder.glob(f"{PREFIX}*") if p.is_dir() and step_of(p.name) >= 0]
    return sorted(found, key=lambda path: step_of(path.name), reverse=True)


def step_of(name: str) -> int:
    """The step that a checkpoint's folder is named after, or -1."""
    digits = name.removeprefix(PREFIX)
    return int(digits) if digits.isdigit() and digits != name else -1
