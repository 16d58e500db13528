"""A saved model: a folder with a safetensors file per skill, stem and head.

    config.json                 shape of the model
    shared.safetensors          norms, and layers without skills
    skill-NAME.safetensors      everything of one skill
    stem-NAME.safetensors       everything of one stem
    head-TASK.safetensors       everything of one task's head
    manifest.json               size and sha256 of each of the above; written last

Other systems than SkillNet cut their weights into files in their own way (``owner``).

The manifest makes the folder a model: a folder without one, or with a file that does not fit
it, is refused.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from skillnet.config import SkillNetConfig
from skillnet.skills import SkillPlan, Task

if TYPE_CHECKING:
    from skillnet.multitask_model import TaskModel
import struct

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
#: Bytes of a header; the longest of ours, of thousands of tensors, take a hundredth of it.
LONGEST_HEADER = 32 * 2**20


def load_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """The tensors of a safetensors file by name.

    Raises:
        ValueError: naming the file: it is no safetensors file (a pickle with that name, say), or
            it holds numbers that are no weights: whole numbers, infinities, not-a-number.
    """
    try:
        tensors: dict[str, Tensor] = load_file(path, device=device)
    except (SafetensorError, ValueError) as problem:
        raise ValueError(
            f"{path} is no safetensors file ({problem}); no other format is read, since it could "
            "run code"
        ) from None
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{path}: {name} is of type {tensor.dtype}, expected floating point")
        # The sum of finite numbers may overflow: only then is it worth a look at each.
        if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name} holds infinities or not-a-number, so it is no weight")
    return tensors


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors of a safetensors file, from its header alone.

    Raises:
        ValueError: naming the file: its header is none.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(LONGEST_HEADER, path.stat().st_size):
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {name: tuple(map(int, entry["shape"])) for name, entry in header.items()}
    except (
        struct.error,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
    ) as problem:
        raise ValueError(
            f"{path} is no safetensors file ({problem}); no other format is read, since it could "
            "run code"
        ) from None


FORMAT = 1


def config_to_dict(config: SkillNetConfig) -> dict[str, Any]:
    """Plain types only, ready for JSON or YAML."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def config_from_dict(values: dict[str, Any]) -> SkillNetConfig:
    """The inverse of :func:`config_to_dict`. ValueError for keys that do not exist."""
    known = {field.name for field in dataclasses.fields(SkillNetConfig)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"unknown model configuration keys: {', '.join(unknown)}")
    tasks = {
        name: Task(
            objective=task["objective"],
            towers={
                tower: SkillPlan(tuple(plan["skills"]), plan["modality"])
                for tower, plan in task["towers"].items()
            },
            outputs=task["outputs"],
        )
        for name, task in values.get("tasks", {}).items()
    }
    rest: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return SkillNetConfig(**(rest | {"tasks": tasks}))


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_parts(model: "TaskModel", folder: Path) -> list[str]:
    """Write the configuration and all weight files into a folder; returns their names."""
    tensors = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
    written = ["config.json"]
    about = config_to_dict(model.config) | {"system": model.system, "options": model.options}
    text = json.dumps(about, indent=1, sort_keys=True, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    for file, names in model.files_of().items():
        save_file({name: tensors[name] for name in names}, folder / f"{file}.safetensors")
        written.append(f"{file}.safetensors")
    return written


def write_manifest(folder: Path, files: list[str], **extra: Any) -> None:
    """Write ``manifest.json`` with size and sha256 of each file; to disk before it returns."""
    entries = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
        for name in sorted(files)
    }
    manifest = {"format": FORMAT, **extra, "files": entries}
    with (folder / "manifest.json").open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a saved model. ValueError if the folder has none or it is damaged."""
    path = folder / "manifest.json"
    if not path.is_file():
        what = "does not exist" if not folder.exists() else "has no manifest.json"
        raise ValueError(f"{folder} is not a whole saved model: it {what}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files = manifest["files"]
        whole = all(
            isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys()
            for entry in files.values()
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(f"{path} is damaged; restore it or save the model again")
    for name in files:
        check_inside(path, name)
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path} has format {manifest.get('format')!r}, expected {FORMAT}")
    return manifest


def check_inside(manifest: Path | str, name: str, deep: bool = False) -> None:
    """ValueError if a manifest names a file outside of its folder.

    Files of folders below count as outside too, unless ``deep``.
    """
    parts = name.split("/")
    plain = all(part not in ("", ".", "..") for part in parts) and not {"\\", "\0"} & set(name)
    if not plain or (len(parts) > 1 and not deep):
        raise ValueError(f"{manifest} names {name!r}, which is no file of this folder")


def check_file(folder: Path, name: str, manifest: dict[str, Any]) -> Path:
    """Path of a file of a saved model, after its hash was compared with the manifest's."""
    path = folder / name
    entry = manifest["files"].get(name)
    if entry is None or not path.is_file():
        raise ValueError(f"{folder} is incomplete: {name} is missing")
    if path.is_symlink():
        raise ValueError(f"{path} is a link; a saved model holds its files itself")
    if path.stat().st_size != entry["bytes"] or sha256(path) != entry["sha256"]:
        raise ValueError(f"{path} was altered or cut short: it does not fit manifest.json")
    return path


def read_about(path: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """``config.json`` of a saved model: its shape, the name of its system, options of that."""
    file = check_file(path, "config.json", manifest)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"{file} is not JSON ({problem})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected keys and values, got {type(values).__name__}")
    return values


def read_config(path: Path, manifest: dict[str, Any]) -> tuple[SkillNetConfig, str, dict[str, Any]]:
    """(configuration, name of the system, its options) of a saved model."""
    values = read_about(path, manifest)
    system, options = values.pop("system", "skillnet"), values.pop("options", {})
    try:
        return config_from_dict(values), str(system), options
    except (ValueError, TypeError, KeyError, AttributeError) as problem:
        raise ValueError(f"{path / 'config.json'}: {_said(problem)}") from None


def _said(problem: Exception) -> str:
    """What an exception says, in one line that is never empty."""
    words = " ".join(str(problem).split())
    return words if type(problem) is ValueError else f"{type(problem).__name__}: {words}"
