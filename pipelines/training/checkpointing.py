"""Checkpoints: written atomically, and verified when read.

    step-00000500/
      config.json, shared.safetensors, skill-*.safetensors, …   the model, as save_pretrained
      optimizer-<file>.safetensors                              optimizer state, a file per skill
      average-<file>.safetensors                                averaged weights, if kept
      state.json                                                step, seed, configuration digest
      manifest.json                                             sizes and hashes; written last

There is no generator state: all randomness is keyed by (seed, step).
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pipelines.runs.checkpoints import (
    PREFIX,
    VerifiedCheckpoint,
    list_checkpoint_folders,
    list_manifest_files,
    load_weights,
)
from pipelines.training.optimizer import WeightAverage
from skillnet.multitask_model import TaskModel
from skillnet.serialization import (
    load_tensors,
    write_manifest,
    write_parts,
)
from skillnet_platform import storage
from skillnet_platform.errors import UserError

#: Tensors that AdamW keeps for each parameter.
OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq")


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, model: TaskModel, names: Iterable[str]
) -> dict[str, Tensor]:
    """Return the optimizer state of named parameters, as ``<parameter>/<field>`` -> tensor.

    Parameters that no step has updated have no state.
    """
    return {
        f"{name}/{field}": optimizer.state[parameter][field]
        for name in names
        if (parameter := model.get_parameter(name)) in optimizer.state
        for field in OPTIMIZER_STATE
    }


def write_checkpoint(
    folder: Path,
    step: int,
    model: TaskModel,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write ``folder/step-<step>`` and remove all but the newest ``keep`` checkpoints.

    Writing the same step again gives the same files.

    Args:
        folder: of the run's checkpoints.
        step: steps done.
        model: its weights are written.
        optimizer: its state is written by parameter name, one file per skill.
        average: averaged weights, or None.
        state: further keys of ``state.json``.
        keep: number of checkpoints that stay.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: the disk is full; earlier checkpoints stay valid.
    """
    final = folder / f"{PREFIX}{step:08d}"
    files = model.files_of()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    state_bytes = sum(
        x.numel() * x.element_size() for s in optimizer.state.values() for x in s.values()
    )
    needed = (1 + (average is not None)) * weights + state_bytes + (1 << 20)
    # A partial file is useless, so check the space before the first byte.
    storage.require_space(final, needed)
    with storage.disk_guard(final, needed), storage.staging_directory(final) as staging:
        written = write_parts(model, staging)
        for file, names in files.items():
            tensors = optimizer_tensors(optimizer, model, names)
            if tensors:
                save_file(_to_cpu(tensors), staging / f"optimizer-{file}.safetensors")
                written.append(f"optimizer-{file}.safetensors")
            if average is not None:
                means = {name: average.values[name] for name in names if name in average.values}
                if means:
                    save_file(_to_cpu(means), staging / f"average-{file}.safetensors")
                    written.append(f"average-{file}.safetensors")
        full = {"step": step, **state}
        if average is not None:
            full["average_updates"] = average.updates
        text = json.dumps(full, indent=1, sort_keys=True)
        (staging / "state.json").write_text(text + "\n", encoding="utf-8")
        write_manifest(staging, [*written, "state.json"])
    # Remove old checkpoints only after the new one is complete.
    for old in list_checkpoint_folders(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load_checkpoint(
    checkpoint: VerifiedCheckpoint,
    model: TaskModel,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None = None,
) -> None:
    """Load a verified checkpoint's weights, optimizer state and averages.

    Args:
        checkpoint: verified, see :func:`pipelines.runs.checkpoints.verify_checkpoint`.
        model: receives the weights.
        optimizer: over the model's parameters; receives their state.
        average: receives the averaged weights.

    Raises:
        UserError: the checkpoint is of a model of another shape.
    """
    load_weights(checkpoint.path, model)
    parameters = dict(model.named_parameters())
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    for path in list_manifest_files(checkpoint.path, "optimizer-"):
        tensors = load_tensors(path)
        for key, value in tensors.items():
            name, _, field = key.rpartition("/")
            # ``step`` is a scalar; the averages have the parameter's shape.
            expected = None if field == "step" else shapes.get(name)
            known = name in shapes and field in OPTIMIZER_STATE
            if not known or value.shape != (expected or ()):
                raise UserError(f"{path}: {key} is not the state of a parameter of this model")
        for key, value in tensors.items():
            name, _, field = key.rpartition("/")
            parameter = parameters[name]
            optimizer.state[parameter][field] = value.to(parameter.device, copy=True)
    if average is not None:
        for path in list_manifest_files(checkpoint.path, "average-"):
            for name, value in load_tensors(path).items():
                if value.shape != shapes.get(name):
                    raise UserError(
                        f"{path}: {name} is not the average of a parameter of this model"
                    )
                average.values[name] = value.to(parameters[name].device, copy=True)
        updates = checkpoint.state.get("average_updates", {})
        if not isinstance(updates, dict) or not all(type(n) is int for n in updates.values()):
            raise UserError(f"{checkpoint.path / 'state.json'}: average_updates are not numbers")
        average.updates = updates


def _to_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # Each tensor gets its own memory: gradients and averages may be views of a shared buffer.
    return {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
