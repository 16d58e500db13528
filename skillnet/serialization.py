"""Files of a saved model: one safetensors file per skill, stem and head, and a manifest.

    config.json                 sizes of the model, name and options of its system, vocabulary
    shared.safetensors          norms, and layers without skills
    skill-NAME.safetensors      all weights of one skill
    stem-NAME.safetensors       all weights of one stem
    head-TASK.safetensors       all weights of the head of one task
    manifest.json               size and sha256 of each file above; written last

Other systems than SkillNet divide their weights into files in their own way (``file_of``). A
directory without a manifest, or with a file that does not match it, is rejected. This module
knows no model class: :mod:`skillnet.multitask_model` builds models from these files.
"""

import dataclasses
import hashlib
import json
import os
import struct
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from safetensors import SafetensorError

from skillnet.config import SkillNetConfig
from skillnet.rust_panics import panics_as_errors
from skillnet.skills import SkillPlan, Task
from skillnet.vocabulary import ModelVocabulary, parse_vocabulary
from skillnet_files.commit import commit_directory, link_or_copy, make_scratch_directory

if TYPE_CHECKING:
    from torch import Tensor

#: Longest accepted header, in bytes. Headers of models with thousands of tensors take 4 % of it.
LONGEST_HEADER = 8 * 2**20
#: Bytes and files of a manifest. A model of a thousand skills and its optimizer take a thirtieth;
#: names of outputs take more.
MAX_MANIFEST_BYTES = 32 * 2**20
MAX_FILES = 20_000
#: Bytes of a configuration, most of which are the names of outputs.
MAX_CONFIG_BYTES = 64 * 2**20


def load_tensors(
    path: Path, device: str = "cpu", drops_integers: bool = False
) -> "dict[str, Tensor]":
    """Read the tensors of a safetensors file.

    Args:
        path: file to read.
        device: where to load them.
        drops_integers: leave out integers and flags, which libraries save as buffers.

    Returns:
        Name -> tensor.

    Raises:
        ValueError: the file is no safetensors file (a renamed pickle, for example), or a tensor is
            not floating point or not finite.
    """
    # torch loads here, so that a wrong folder is reported without it.
    import torch

    tensors = map_tensors(path, device)
    floats = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    if drops_integers:
        whole = {name for name, tensor in tensors.items() if _is_integer(tensor)}
        tensors = {name: tensor for name, tensor in tensors.items() if name not in whole}
    for name, tensor in tensors.items():
        if tensor.dtype not in floats:
            raise ValueError(f"{path}: {name} is of type {tensor.dtype}, expected floating point")
        # The sum of finite numbers can overflow. Only then is each number checked.
        if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name} holds infinities or not-a-number, so it is no weight")
    return tensors


def map_tensors(path: Path, device: str = "cpu") -> "dict[str, Tensor]":
    """Map the tensors of a safetensors file into memory, without a look at their numbers.

    Pages are read when they are used. All processes of a machine share them until one of them
    writes.

    Args:
        path: file to map.
        device: where to load them; on a GPU they are copied.

    Returns:
        Name -> tensor.

    Raises:
        ValueError: the file is no safetensors file.
    """
    from safetensors.torch import load_file

    try:
        with panics_as_errors("the header or a tensor is damaged"):
            tensors: dict[str, Tensor] = load_file(path, device=device)
    except (SafetensorError, ValueError) as problem:
        raise ValueError(
            f"{path} is no safetensors file ({problem}); no other format is read, since it could "
            "run code"
        ) from None
    return tensors


TensorMarks = tuple[tuple[int, int, int], ...]


def mark_tensors(tensors: "Mapping[str, Tensor]") -> TensorMarks:
    """Return what differs as soon as a tensor gets another value, or is another one.

    Args:
        tensors: name -> tensor.
    """
    return tuple((id(x), x.data_ptr(), x._version) for x in tensors.values())


class SavedFile(NamedTuple):
    """File of a saved model that holds weights of a model, as long as these do not change.

    A model may map the file without having read it. Each copy of the model then gets the file and
    its digest, not the weights. A damaged file therefore never gets a digest that fits it, and is
    refused where a task needs it.

    Args:
        path: the file.
        entry: its size and hash, from the manifest beside it.
        marks: result of :func:`mark_tensors` for the weights.
    """

    path: Path
    entry: Mapping[str, Any]
    marks: TensorMarks


def _is_integer(tensor: "Tensor") -> bool:
    return not tensor.dtype.is_floating_point and not tensor.dtype.is_complex


def read_tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read name -> shape of the tensors of a safetensors file, from its header.

    Raises:
        ValueError: the file has no valid header, or other data than its header says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            # The length is untrusted: reading it unchecked could allocate any amount of memory.
            if length > min(LONGEST_HEADER, size):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        _check_extent(header, size - 8 - length)
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


def _check_extent(header: dict[str, Any], size: int) -> None:
    """Require that the tensors of a header lie one after the other and fill the data of a file.

    Raises:
        ValueError: they do not, as in a file that was cut short.
    """
    end = 0
    for begin, stop in sorted(tuple(entry["data_offsets"]) for entry in header.values()):
        if begin != end or stop < begin:
            raise ValueError("its tensors overlap or leave gaps")
        end = stop
    if end != size:
        raise ValueError(f"cut short or too long: {size} bytes of data, expected {end}")


FORMAT = 3

#: Key of the packages of skills of a model in its ``manifest.json``.
PACKAGES = "packages"


class SavableModel(Protocol):
    """The part of a model that its files store."""

    config: SkillNetConfig
    options: dict[str, Any]
    vocabulary: ModelVocabulary
    packages: dict[str, Any]
    unread: dict[str, SavedFile]
    system: ClassVar[str]

    def named_parameters(self) -> Any:
        """Iterate over (name, parameter)."""

    def files_of(self, task: str | None = None) -> dict[str, list[str]]:
        """Return file -> names of its parameters, of all tasks or of one."""


def config_to_dict(config: SkillNetConfig) -> dict[str, Any]:
    """Convert a model configuration to plain types, ready for JSON or YAML."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def config_from_dict(values: dict[str, Any]) -> SkillNetConfig:
    """Build a model configuration from plain types, the inverse of :func:`config_to_dict`.

    Raises:
        ValueError: unknown keys, or invalid values.
    """
    known = {field.name for field in dataclasses.fields(SkillNetConfig)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"unknown model configuration keys: {', '.join(unknown)}")
    rest: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    tasks = {key: _parse_tasks(values.get(key, {})) for key in ("tasks", "reference_tasks")}
    return SkillNetConfig(**(rest | tasks))


def _parse_tasks(values: dict[str, Any]) -> dict[str, Task]:
    return {
        name: Task(
            objective=task["objective"],
            towers={
                tower: SkillPlan(tuple(plan["skills"]), plan["modality"])
                for tower, plan in task["towers"].items()
            },
            outputs=task["outputs"],
            linear_path=task["linear_path"],
        )
        for name, task in values.items()
    }


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_config(model: SavableModel, folder: Path) -> str:
    """Write the configuration of a model; return the name of the file.

    Args:
        model: any system.
        folder: existing directory.
    """
    about = config_to_dict(model.config) | {
        "system": model.system,
        "options": model.options,
        "vocabulary": model.vocabulary.restrict_to(model.config.tasks).to_dict(),
    }
    (folder / "config.json").write_text(format_about(about), encoding="utf-8")
    return "config.json"


def format_about(about: Mapping[str, Any]) -> str:
    """Return the text of ``config.json``: equal values give equal bytes."""
    return json.dumps(about, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def write_parts(
    model: SavableModel,
    folder: Path,
    read_weight: "Callable[[str], Tensor] | None" = None,
    save: "Callable[[Mapping[str, Tensor], Path], None] | None" = None,
) -> list[str]:
    """Write the configuration and all weight files of a model, one file at a time.

    Args:
        model: any system.
        folder: existing directory.
        read_weight: returns the weight of a name; None takes it from the model.
        save: writes the tensors of a file; None takes :func:`save_tensors`.

    Returns:
        Names of the files.
    """
    written = [write_config(model, folder)]
    read = read_weight or dict(model.named_parameters()).__getitem__
    for file, names in model.files_of().items():
        (save or save_tensors)({name: read(name) for name in names}, folder / f"{file}.safetensors")
        written.append(f"{file}.safetensors")
    return written


def save_tensors(tensors: "Mapping[str, Tensor]", path: Path) -> None:
    """Write a safetensors file with the mode of a new file.

    Args:
        tensors: name -> tensor, no two of which share memory.
        path: location of the file; replaced if it exists.
    """
    from safetensors.torch import save_file

    # safetensors needs contiguous tensors on the host.
    laid_out = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    # safetensors makes a private file, and renames it.
    path.unlink(missing_ok=True)
    path.touch()
    mode = path.stat().st_mode
    save_file(laid_out, path)
    path.chmod(mode)


def write_manifest(
    folder: Path,
    files: list[str],
    known: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    **extra: Any,
) -> None:
    """Write ``manifest.json`` with size and sha256 of each file, and flush it to disk.

    Args:
        folder: directory of the files.
        files: their names.
        known: name -> size and sha256 of files that are not read for it.
        **extra: further entries.
    """
    described = {**known, **describe_files(folder, [name for name in files if name not in known])}
    commit_manifest(folder, {"format": FORMAT, **extra, "files": described})


def describe_files(folder: Path, files: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return name -> size and sha256 of files.

    Args:
        folder: directory of the files.
        files: their names.
    """
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": hash_file(folder / name)}
        for name in sorted(files)
    }


def commit_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write ``manifest.json``, and flush it to disk.

    Args:
        folder: directory of the files.
        manifest: content.
    """
    with (folder / "manifest.json").open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1, sort_keys=True)
        file.write("\n")
        file.flush()
        # The manifest makes the directory valid, so it must reach the disk after all other files.
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a saved model.

    Raises:
        ValueError: the directory has no manifest, or it is damaged or of another format.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        what = "does not exist" if not folder.exists() else "has no manifest.json"
        raise ValueError(f"{folder} is not a complete saved model: it {what}")
    _require_size(path, MAX_MANIFEST_BYTES)
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
    if len(files) > MAX_FILES:
        raise ValueError(f"{path} names {len(files)} files; at most {MAX_FILES} are read")
    for name in files:
        check_inside(path, name)
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path} has format {manifest.get('format')!r}, expected {FORMAT}")
    return manifest


def _require_size(path: Path, most: int) -> None:
    """Raise ValueError if a file is larger than any program writes it."""
    size = path.stat().st_size
    if size > most:
        raise ValueError(f"{path} has {size} bytes; at most {most} are read")


def check_inside(manifest: Path | str, name: str, deep: bool = False) -> None:
    """Raise ValueError if a manifest names a file outside its directory.

    Args:
        manifest: path of the manifest, for the message.
        name: file, relative to its folder.
        deep: accept files in subdirectories.
    """
    parts = name.split("/")
    plain = all(part not in ("", ".", "..") for part in parts) and not {"\\", "\0"} & set(name)
    if not plain or (len(parts) > 1 and not deep):
        raise ValueError(f"{manifest} names {name!r}, which is no file of this folder")


def check_file(folder: Path, name: str, manifest: dict[str, Any]) -> Path:
    """Compare a file of a saved model with its manifest.

    Args:
        folder: directory of the saved model.
        name: file, relative to its folder.
        manifest: from :func:`read_manifest`.

    Returns:
        Path of the file.

    Raises:
        ValueError: the file is missing, a link, or does not match size and hash.
    """
    path = find_file(folder, name, manifest)
    if hash_file(path) != manifest["files"][name]["sha256"]:
        raise _altered(path)
    return path


def find_file(folder: Path, name: str, manifest: dict[str, Any]) -> Path:
    """Compare presence and size of a file with the manifest, without reading the file.

    Args:
        folder: directory of the saved model.
        name: file, relative to its folder.
        manifest: from :func:`read_manifest`.

    Returns:
        Path of the file.

    Raises:
        ValueError: the file is missing, a link, or of another size.
    """
    path = folder / name
    entry = manifest["files"].get(name)
    if entry is None or not path.is_file():
        raise ValueError(f"{folder} is incomplete: {name} is missing")
    # A link could point to another file after the check.
    if path.is_symlink():
        raise ValueError(f"{path} is a link; a saved model holds its files itself")
    if path.stat().st_size != entry["bytes"]:
        raise _altered(path)
    return path


def _altered(path: Path) -> ValueError:
    return ValueError(f"{path} was altered or cut short: it does not fit manifest.json")


def read_about(path: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Read ``config.json`` of a saved model: sizes, name and options of its system, vocabulary.

    Args:
        path: directory of the saved model.
        manifest: from :func:`read_manifest`.

    Raises:
        ValueError: the file does not match the manifest, or is no JSON object.
    """
    file = check_file(path, "config.json", manifest)
    _require_size(file, MAX_CONFIG_BYTES)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"{file} is not JSON ({problem})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected keys and values, got {type(values).__name__}")
    return values


def read_config(path: Path, manifest: dict[str, Any]) -> tuple[SkillNetConfig, str, dict[str, Any]]:
    """Read the configuration of a saved model.

    Args:
        path: directory of the saved model.
        manifest: from :func:`read_manifest`.

    Returns:
        (configuration, name of the system, options of the system).

    Raises:
        ValueError: the file does not match the manifest, or its values are invalid.
    """
    values = read_about(path, manifest)
    system, options = values.pop("system", "skillnet"), values.pop("options", {})
    values.pop("vocabulary", None)
    try:
        return config_from_dict(values), str(system), options
    except (ValueError, TypeError, KeyError, AttributeError) as problem:
        raise ValueError(f"{path / 'config.json'}: {describe_error(problem)}") from None


def read_vocabulary(path: Path, manifest: dict[str, Any]) -> ModelVocabulary:
    """Read the vocabulary of a saved model.

    Args:
        path: directory of the saved model.
        manifest: from :func:`read_manifest`.

    Raises:
        ValueError: the file does not match the manifest, or holds no valid vocabulary.
    """
    values = read_about(path, manifest)
    try:
        return parse_vocabulary(values.get("vocabulary"))
    except ValueError as problem:
        raise ValueError(f"{path / 'config.json'}: {problem}") from None


def describe_error(problem: Exception) -> str:
    """Return the message of an exception in one line that is never empty."""
    words = " ".join(str(problem).split())
    return words if type(problem) is ValueError else f"{type(problem).__name__}: {words}"


def save_model(
    model: SavableModel, path: Path, read_weight: "Callable[[str], Tensor] | None" = None
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
    model: SavableModel, folder: Path, read_weight: "Callable[[str], Tensor] | None" = None
) -> None:
    """Write the files of a model and their manifest into a directory that nobody reads yet.

    The manifest lists the weight files of each task, so that one task can be downloaded alone.

    Args:
        model: any system.
        folder: existing directory.
        read_weight: see :func:`skillnet.serialization.write_parts`.
    """
    known: dict[str, Mapping[str, Any]] = {}

    def save(tensors: "Mapping[str, Tensor]", path: Path) -> None:
        unread = model.unread.get(path.stem)
        is_same = unread is not None and unread.marks == mark_tensors(tensors)
        if unread is not None and is_same and unread.path.is_file():
            link_or_copy(unread.path, path)
            known[path.name] = unread.entry
        else:
            save_tensors(tensors, path)

    written = write_parts(model, folder, read_weight, save)
    packages = {PACKAGES: model.packages} if model.packages else {}
    write_manifest(folder, written, known, tasks=list_task_files(model), **packages)


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


def require_saved_shapes(
    folder: Path, model: SavableModel, manifest: dict[str, Any], unread: Collection[str] = ()
) -> None:
    """Require that the headers of a model's files name its weights and shapes.

    Args:
        folder: directory of the saved model.
        model: built from its configuration; its weights are not read.
        manifest: parsed ``manifest.json`` of the folder.
        unread: files, without suffix, that are not hashed.

    Raises:
        ValueError: a weight is missing, unknown, or has another shape.
    """
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    names_of = model.files_of()
    # Hashing takes half of the time to load a model, and runs without Python's global lock.
    with ThreadPoolExecutor() as pool:
        paths = list(
            pool.map(
                lambda file: (find_file if file in unread else check_file)(
                    folder, f"{file}.safetensors", manifest
                ),
                names_of,
            )
        )
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
