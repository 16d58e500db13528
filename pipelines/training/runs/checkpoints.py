"""Checkpoints of a run on disk: find the newest, verify files, load weights."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skillnet.multitask_model import TaskModel
from skillnet.serialization import (
    check_file,
    find_file,
    load_tensors,
    read_manifest,
)
from skillnet_platform import console, storage
from skillnet_platform.errors import UserError

PREFIX = "step-"
WEIGHTS = ".safetensors"
#: Files of the optimizer state, of averages and of the best weights are named after those of their
#: weights.
STATE_PREFIXES = ("optimizer-", "average-", "best-")


@dataclass
class VerifiedCheckpoint:
    """A verified checkpoint on disk.

    Args:
        path: its folder.
        state: content of its ``state.json``.
        unread: files of weights, without suffix, of which only presence and size are verified.
    """

    path: Path
    state: dict[str, Any]
    unread: frozenset[str] = field(default_factory=frozenset)

    @property
    def step(self) -> int:
        """Steps done when the checkpoint was written."""
        return int(self.state["step"])


def find_newest(
    folder: Path, used: Collection[str] | None = None, is_hashed: bool = True
) -> VerifiedCheckpoint | None:
    """Return the newest valid checkpoint of a run, or None; warn about invalid ones.

    Args:
        folder: directory of the checkpoints.
        used: see :func:`verify_checkpoint`.
        is_hashed: see :func:`verify_checkpoint`.
    """
    for path in list_checkpoint_folders(folder):
        try:
            return verify_checkpoint(path, used, is_hashed)
        except ValueError as error:
            console.print_warning(f"{error}; trying the checkpoint before it")
    return None


def verify_checkpoint(
    path: str | Path, used: Collection[str] | None = None, is_hashed: bool = True
) -> VerifiedCheckpoint:
    """Compare the files of a checkpoint with its manifest.

    Args:
        path: folder of the checkpoint.
        used: files of weights, without suffix, that the run's tasks use; they are hashed with
            their state. Others must exist with their size; a run that uses them hashes them. None
            hashes all.
        is_hashed: False compares presence and size alone, for what another process hashes.

    Raises:
        UserError: it is incomplete or corrupt; names the file.
    """
    path, unread = Path(path), set[str]()
    try:
        manifest = read_manifest(path)
        for name in manifest["files"]:
            file, suffix = name.removesuffix(WEIGHTS), name.endswith(WEIGHTS)
            is_used = used is None or not suffix or file.removeprefix(_prefix_of(file)) in used
            (check_file if is_used and is_hashed else find_file)(path, name, manifest)
            if not is_used and not _prefix_of(file):
                unread.add(file)
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
    return VerifiedCheckpoint(path, state, frozenset(unread))


def _prefix_of(file: str) -> str:
    """Return the prefix of a file of state, "" for one of weights."""
    return next((prefix for prefix in STATE_PREFIXES if file.startswith(prefix)), "")


@torch.no_grad()
def load_weights(
    path: Path,
    model: TaskModel,
    store_weight: Callable[[str, Tensor], None] | None = None,
    unread: Collection[str] = (),
    is_verified: bool = False,
) -> None:
    """Copy a saved model's weights into a model of the same shape.

    Args:
        path: folder of the saved model or checkpoint.
        model: receives the weights.
        store_weight: receives name and value of each weight instead of the model.
        unread: files, without suffix, that are mapped into the model: neither hashed nor read.
        is_verified: the files were hashed before.

    Raises:
        UserError: a file is missing or corrupt, or weights do not fit.
    """
    manifest = read_manifest(path)
    parameters = dict(model.named_parameters())
    # One file at a time: peak memory is one file, not the complete model.
    for file, names in model.files_of().items():
        if file in unread:
            weights = {name: parameters[name] for name in names}
            model.map_file(file, weights, path / f"{file}.safetensors", manifest)
            continue
        find = find_file if is_verified else check_file
        tensors = load_tensors(find(path, f"{file}.safetensors", manifest))
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


def list_checkpoint_folders(folder: Path) -> list[Path]:
    """Return the checkpoint folders, newest first, complete or not."""
    found = [p for p in folder.glob(f"{PREFIX}*") if p.is_dir() and step_of(p.name) >= 0]
    return sorted(found, key=lambda path: step_of(path.name), reverse=True)


def step_of(name: str) -> int:
    """Return the step in the name of a checkpoint's folder, or -1."""
    digits = name.removeprefix(PREFIX)
    return int(digits) if digits.isdigit() and digits != name else -1
