"""Packages of skills: what a task adds to a base model, in one file, with the digests of the base.

    NAME.skill                    a zip whose files are stored as they are
      skill.json                  names, tasks, digests of the base, sizes and hashes of all files
      skill-*.safetensors, …      weights of the skills and heads, and of stems that the base lacks
      inputs-*.safetensors        counts of training rows, for inputs without a task
      probes.safetensors          outputs of the tasks on generated inputs, at the author

A package joins exactly the base that it was trained on: every file that its tasks read from the
base has a digest in it. Adding links or copies files, so no weight of an old task changes, and
removing restores the bytes of every file. :func:`pack_skills` writes a package;
:mod:`skillnet.package_joins` adds it to a saved model.

The format is ours. Weights are safetensors, and nothing in a package is executed.
"""

import dataclasses
import hashlib
import json
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any

import torch
from annotated_types import Len
from pydantic import (
    ConfigDict,
    Field,
    StrictFloat,
    StrictInt,
    StrictStr,
    TypeAdapter,
    ValidationError,
    with_config,
)
from torch import Tensor

from skillnet.bounds import MAX_ABOUT_BYTES, PACKAGE_SUFFIX
from skillnet.config import INITIAL_SETTINGS, NAME_SETTINGS, SkillNetConfig
from skillnet.model import SkillNet
from skillnet.router import name_counts
from skillnet.serialization import (
    check_file,
    config_from_dict,
    config_to_dict,
    describe_files,
    read_manifest,
    read_tensor_shapes,
    save_tensors,
)
from skillnet.skill_proofs import probe_outputs
from skillnet.skills import find_task
from skillnet.skipped_init import SkippedInit
from skillnet.vocabulary import ModelVocabulary, parse_scale
from skillnet_files.commit import make_scratch_directory

FORMAT = 1
ABOUT, PROBES = "skill.json", "probes.safetensors"
MAX_FILES = 1000
_WEIGHTS = re.compile(r"(skill|head|stem)-[A-Za-z0-9_.-]{1,200}\.safetensors")

Sha = Annotated[StrictStr, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")]
CLOSED = ConfigDict(allow_inf_nan=False, extra="forbid")


@with_config(CLOSED)
@dataclass(frozen=True)
class PackedFile:
    """Size in bytes and SHA-256 of a file."""

    bytes: Annotated[StrictInt, Field(ge=0, lt=2**40)]
    sha256: Sha


@with_config(CLOSED)
@dataclass(frozen=True)
class PackedForm:
    """Source and rank of a low-rank skill, see :class:`skillnet.config.LowRankSkill`."""

    source: Name
    rank: Annotated[StrictInt, Field(ge=1)]


@with_config(CLOSED)
@dataclass(frozen=True)
class PackedTask:
    """A task of a package.

    Args:
        plan: objective, towers and outputs, as in ``config.json``.
        names: identifiers of its outputs; None if it has none.
        scale: mean and deviation of the targets of a regression; None for others.
        serving: corpus, limits and preprocessing that predictions use; None if unknown.
        evaluation: rows of metrics with intervals, as measured by the author.
        flops: operations of one example.
        parameters: that the task activates.
    """

    plan: dict[str, Any]
    names: list[StrictStr] | None
    scale: tuple[StrictFloat, StrictFloat] | None
    serving: dict[str, Any] | None
    evaluation: list[dict[str, Any]]
    flops: StrictInt
    parameters: StrictInt


@with_config(CLOSED)
@dataclass(frozen=True)
class PackageContent:
    """Content of ``skill.json``.

    Args:
        format: version of the format.
        name: key of the package in a model.
        program: version of skillnet-platform that wrote it.
        skills: that it adds.
        low_rank: skill of the package -> source and rank, of low-rank differences.
        tasks: that it adds.
        shape: sizes that the base must have, as in ``config.json``.
        tokenizer: SHA-256 of the tokenizer that its tasks read with; None if unknown.
        base: file of the base -> SHA-256, of all files that its tasks read.
        files: file of the package -> size and hash.
    """

    format: StrictInt
    name: Name
    program: StrictStr
    skills: list[Name]
    low_rank: dict[Name, PackedForm]
    tasks: Annotated[dict[Name, PackedTask], Len(min_length=1)]
    shape: dict[str, Any]
    tokenizer: Sha | None
    base: dict[StrictStr, Sha]
    files: Annotated[dict[StrictStr, PackedFile], Len(max_length=MAX_FILES)]


@dataclass(frozen=True)
class SkillPackage:
    """An opened package, whose files were compared with their hashes.

    Args:
        path: location of the package.
        digest: SHA-256 of ``skill.json``, which has the hashes of all other files.
        content: parsed ``skill.json``.
        folder: directory of the other files; None if only the header was read.
    """

    path: Path
    digest: str
    content: PackageContent
    folder: Path | None

    def find_file(self, name: str) -> Path:
        """Return the location of a file of the package."""
        assert self.folder is not None, "only the header was read"
        return self.folder / name

    @property
    def name(self) -> str:
        """Name of the package."""
        return self.content.name

    @property
    def weights(self) -> list[str]:
        """Names of the files with weights."""
        return [name for name in self.content.files if _WEIGHTS.fullmatch(name)]

    @property
    def inputs(self) -> dict[str, Path]:
        """Files with the counts of the inputs of its tasks, by name."""
        names = map(name_counts, self.content.tasks)
        return {name: self.find_file(name) for name in names if name in self.content.files}


# -- writing -------------------------------------------------------------------------------


def pack_skills(
    folder: Path,
    tasks: Sequence[str],
    target: Path,
    *,
    program: str,
    serving: Mapping[str, Mapping[str, Any]] | None = None,
    evaluation: Sequence[Mapping[str, Any]] = (),
) -> PackageContent:
    """Write a package of tasks, and of the skills that no other task of the model activates.

    Args:
        folder: saved model with these tasks and with those of its base.
        tasks: names of the tasks.
        target: file to write, with the suffix ``.skill``; replaced if it exists.
        program: version of the program.
        serving: task -> what predictions need.
        evaluation: rows of metrics of all tasks.

    Raises:
        ValueError: the model is damaged or has no skills, a task is unknown, or nothing of the
            model would be left as a base.
    """
    if target.suffix != PACKAGE_SUFFIX:
        raise ValueError(f"{target}: a package ends with {PACKAGE_SUFFIX}")
    manifest = read_manifest(folder)
    model = SkillNet.from_pretrained(folder)
    config = model.config
    for task in tasks:
        find_task(task, config.tasks)
    others = [task for task in config.tasks if task not in tasks]
    # What another task reads belongs to the base; the rest came with these tasks.
    needed = {file for task in tasks for file in model.required_files(task)}
    common = {file for task in others for file in model.required_files(task)}
    own = sorted(file for file in needed - common if file != "shared")
    if not others:
        raise ValueError(
            f"{folder}: it has no task beside {', '.join(tasks)}, so it holds no base. Pack a "
            "model that grew from one"
        )
    skills = [file.removeprefix("skill-") for file in own if file.startswith("skill-")]
    # A package appears whole or not at all.
    with make_scratch_directory(target) as staging:
        for file in own:
            shutil.copyfile(
                check_file(folder, f"{file}.safetensors", manifest), staging / f"{file}.safetensors"
            )
        save_tensors(_flatten(probe_outputs(model, tasks)), staging / PROBES)
        counts = [name for name in map(name_counts, tasks) if (folder / name).is_file()]
        for name in counts:
            shutil.copyfile(folder / name, staging / name)
        vocabulary = model.vocabulary
        listed = [*(f"{file}.safetensors" for file in own), *counts, PROBES]
        about = {
            "format": FORMAT,
            "name": target.stem,
            "program": program,
            "skills": skills,
            "low_rank": {
                skill: dataclasses.asdict(form)
                for skill, form in config.low_rank_skills.items()
                if skill in skills
            },
            "tasks": {
                task: {
                    "plan": config_to_dict(config)["tasks"][task],
                    "names": _listed(vocabulary.outputs.get(task)),
                    "scale": _listed(vocabulary.scales.get(task)),
                    "serving": dict(serving[task]) if serving and task in serving else None,
                    "evaluation": [dict(row) for row in evaluation if row.get("task") == task],
                    "flops": model.flops(task)[0],
                    "parameters": model.activated_parameters(task),
                }
                for task in tasks
            },
            "shape": _shape_of(config),
            "tokenizer": vocabulary.tokenizer,
            "base": {
                f"{file}.safetensors": manifest["files"][f"{file}.safetensors"]["sha256"]
                for file in sorted(needed - set(own))
            },
            "files": describe_files(staging, listed),
        }
        text = json.dumps(about, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        content = _parse_about(target, text.encode())
        archive = staging / f"package{PACKAGE_SUFFIX}"
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as written:
            # A fixed date: equal content gives equal bytes.
            written.writestr(zipfile.ZipInfo(ABOUT), text)
            for name in listed:
                with written.open(zipfile.ZipInfo(name), "w", force_zip64=True) as stream:
                    stream.write((staging / name).read_bytes())
        archive.replace(target)
    return content


def _listed(values: Sequence[Any] | None) -> list[Any] | None:
    return None if values is None else list(values)


def _shape_of(config: SkillNetConfig) -> dict[str, Any]:
    values = config_to_dict(config).items()
    return {k: v for k, v in values if k not in (*NAME_SETTINGS, *INITIAL_SETTINGS)}


# -- reading -------------------------------------------------------------------------------

#: Errors of :mod:`zipfile` on damaged files.
_DAMAGES = (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, RuntimeError)


@contextmanager
def open_package(path: Path, scratch: Path) -> Iterator[SkillPackage]:
    """Read a package into a directory beside ``scratch``, and compare all files with their hashes.

    Args:
        path: location of the package.
        scratch: path beside which the files lie while the block runs.

    Raises:
        ValueError: the file is missing, damaged, no package, or of another format.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with make_scratch_directory(scratch) as folder:
        try:
            with zipfile.ZipFile(path) as archive:
                about = _read_about(path, archive)
                content = _parse_about(path, about)
                _extract(path, archive, content, folder)
        except _DAMAGES as error:
            raise ValueError(f"{path}: no whole package of skills ({error})") from None
        digest = hashlib.sha256(about).hexdigest()
        yield SkillPackage(path, digest, content, folder)


def read_package_header(stream: IO[bytes], path: Path) -> SkillPackage:
    """Read what a package states, without its files.

    Args:
        stream: seekable content of the package.
        path: name of the package, for messages.

    Returns:
        A package without a folder.

    Raises:
        ValueError: it is damaged, no package, or of another format.
    """
    try:
        with zipfile.ZipFile(stream) as archive:
            about = _read_about(path, archive)
            content = _parse_about(path, about)
            _check_listed(path, archive, content)
    except _DAMAGES as error:
        raise ValueError(f"{path}: no whole package of skills ({error})") from None
    return SkillPackage(path, hashlib.sha256(about).hexdigest(), content, None)


def _read_about(path: Path, archive: zipfile.ZipFile) -> bytes:
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    if ABOUT not in names:
        raise ValueError(f"{path}: no package of skills: it has no {ABOUT}")
    if len(names) > MAX_FILES + 2 or len(set(names)) < len(names):
        raise ValueError(f"{path}: {len(names)} files, or two of one name; the package is damaged")
    for entry in entries:
        # A stored file is as long as it says, so no small package becomes a large one.
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise ValueError(
                f"{path}: {entry.filename!r} is compressed or encrypted; pack it again"
            )
    if archive.getinfo(ABOUT).file_size > MAX_ABOUT_BYTES:
        raise ValueError(f"{path}: {ABOUT} has more than {MAX_ABOUT_BYTES} bytes")
    return archive.read(ABOUT)


def _parse_about(path: Path, text: bytes) -> PackageContent:
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: {ABOUT} is not JSON; the package is damaged") from None
    found = tree.get("format") if isinstance(tree, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path}: format {str(found)[:40]!r}, this program reads {FORMAT}")
    try:
        content = TypeAdapter(PackageContent).validate_python(tree)
    except ValidationError as error:
        raise ValueError(f"{path}: {ABOUT}: {describe_wrong_value(error)}") from None
    others = {PROBES, *map(name_counts, content.tasks)}
    for name in content.files:
        if name not in others and not _WEIGHTS.fullmatch(name):
            raise ValueError(f"{path}: {ABOUT} names {name!r}, which is no file of a package")
    if PROBES not in content.files:
        raise ValueError(f"{path}: {ABOUT} does not list {PROBES}")
    wanted = {f"skill-{skill}.safetensors" for skill in content.skills}
    wanted |= {f"head-{task}.safetensors" for task in content.tasks}
    listed = {name for name in content.files if name.startswith(("skill-", "head-"))}
    if wanted != listed:
        raise ValueError(
            f"{path}: {ABOUT} has files for other skills and tasks than it names: "
            f"{', '.join(sorted(wanted ^ listed))[:200]}"
        )
    return content


def describe_wrong_value(error: ValidationError) -> str:
    """Return key and message of the first wrong value of a stored document."""
    problem = error.errors(include_url=False)[0]
    key = ".".join(map(str, problem["loc"])).encode("utf-8", "backslashreplace").decode()
    return f"{key[:120]}: {problem['msg']}"


def _check_listed(path: Path, archive: zipfile.ZipFile, content: PackageContent) -> None:
    present = set(archive.namelist()) - {ABOUT}
    if present != content.files.keys():
        names = ", ".join(sorted(present ^ content.files.keys()))[:200]
        raise ValueError(f"{path}: its files are not those that {ABOUT} lists: {names}")
    for name, entry in content.files.items():
        if archive.getinfo(name).file_size != entry.bytes:
            raise ValueError(f"{path}: {name} was altered: it has another size")


def _extract(path: Path, archive: zipfile.ZipFile, content: PackageContent, folder: Path) -> None:
    _check_listed(path, archive, content)
    # Names come from the checked list only, so no file leaves the folder.
    for name, entry in content.files.items():
        digest = hashlib.sha256()
        with archive.open(name) as stream, (folder / name).open("wb") as target:
            while block := stream.read(2**20):
                digest.update(block)
                target.write(block)
        if digest.hexdigest() != entry.sha256:
            raise ValueError(f"{path}: {name} was altered: it does not fit its hash")


# -- joining -------------------------------------------------------------------------------


def join_config(config: SkillNetConfig, package: SkillPackage, model: str) -> SkillNetConfig:
    """Return the configuration of a model with the skills and tasks of a package.

    Args:
        config: settings of the model.
        package: an opened package.
        model: name of the model, for messages.

    Raises:
        ValueError: the model has another shape, or a name of the package is taken.
    """
    content, shape = package.content, _shape_of(config)
    for key in sorted(shape.keys() | content.shape.keys()):
        if shape.get(key) != content.shape.get(key):
            raise ValueError(
                f"{package.path}: made for a base with model.{key} {content.shape.get(key)!r}; "
                f"{model} has {shape.get(key)!r}"
            )
    for kind, names, taken in (
        ("skill", content.skills, config.skills),
        ("task", content.tasks, config.tasks),
    ):
        for name in names:
            if name in taken:
                raise ValueError(
                    f"{package.path}: {model} already has a {kind} {name!r}. Remove it, or pack "
                    "the model again with another name"
                )
    known = config_to_dict(config)
    plans = {name: task.plan for name, task in content.tasks.items()}
    known["skills"] = [*config.skills, *content.skills]
    known["tasks"] = {**known["tasks"], **plans}
    # A form of another skill would change what the model has.
    for name in sorted(content.low_rank.keys() - set(content.skills)):
        raise ValueError(f"{package.path}: {ABOUT}: low_rank.{name}: the package has no such skill")
    forms = {name: dataclasses.asdict(form) for name, form in content.low_rank.items()}
    known["low_rank_skills"] = {**known["low_rank_skills"], **forms}
    try:
        return config_from_dict(known)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{package.path}: {ABOUT}: {' '.join(str(error).split())}") from None


def join_vocabulary(vocabulary: ModelVocabulary, package: SkillPackage) -> ModelVocabulary:
    """Return the vocabulary of a model with the outputs of a package.

    Args:
        vocabulary: tokenizer and outputs of the model.
        package: an opened package, whose plans :func:`join_config` accepted.

    Raises:
        ValueError: a task has another number of names than outputs, or its scale is no scale.
    """
    outputs, scales = dict(vocabulary.outputs), dict(vocabulary.scales)
    for task, packed in package.content.tasks.items():
        if packed.names is not None:
            if len(packed.names) != packed.plan["outputs"]:
                raise ValueError(
                    f"{package.path}: {task} has {len(packed.names)} names and "
                    f"{packed.plan['outputs']} outputs"
                )
            outputs[task] = tuple(packed.names)
        if packed.scale is not None:
            scales[task] = parse_scale(list(packed.scale), f"{package.path}: {task}.scale")
    return ModelVocabulary(vocabulary.tokenizer, outputs, scales)


def check_base(
    package: SkillPackage, hashes: Mapping[str, str], tokenizer: str | None, model: str
) -> None:
    """Require that a model has the base of a package.

    Args:
        package: an opened package.
        hashes: file of the model -> SHA-256.
        tokenizer: SHA-256 of the tokenizer of the model; None if unknown.
        model: name of the model, for messages.

    Raises:
        ValueError: a file of the base is missing or another one, the tokenizer is another one, or
            the model has other weights under the name of a file of the package.
    """
    content = package.content
    for name, expected in content.base.items():
        found = hashes.get(name)
        if found != expected:
            has = "lacks it" if found is None else f"has {found[:16]}"
            raise ValueError(
                f"{package.path}: made for another base: its {name} is {expected[:16]}, {model} "
                f"{has}. Add it to the model that it was grown from"
            )
    if content.tokenizer and tokenizer and content.tokenizer != tokenizer:
        raise ValueError(
            f"{package.path}: made with the tokenizer {content.tokenizer[:16]}; {model} has "
            f"{tokenizer[:16]}, which reads the same text as other tokens"
        )
    for name in package.weights:
        # Two packages may bring the same stem, which the base lacks.
        if hashes.get(name, content.files[name].sha256) != content.files[name].sha256:
            raise ValueError(
                f"{package.path}: {model} has another {name}. Remove the package that brought it"
            )


def require_shapes(package: SkillPackage, config: SkillNetConfig) -> dict[str, list[str]]:
    """Require that the files of a package hold the weights that its tasks need.

    Args:
        package: an opened package.
        config: result of :func:`join_config`.

    Returns:
        Task of the package -> files that it reads, of the package and of the base.

    Raises:
        ValueError: a weight is missing, unknown, or has another shape or type.
    """
    wanted: dict[str, dict[str, tuple[int, ...]]] = {}
    files: dict[str, list[str]] = {}
    for task in package.content.tasks:
        # Shapes alone: a few bytes of a plan may ask for any amount of memory.
        with torch.device("meta"), SkippedInit():
            model = SkillNet(SkillNet.config_for(config, task))
        files[task] = sorted(f"{file}.safetensors" for file in model.files_of())
        for name, parameter in model.named_parameters():
            file = f"{model.file_of(name)}.safetensors"
            wanted.setdefault(file, {})[name] = tuple(parameter.shape)
    reads = wanted.keys()
    for name in package.weights:
        if name not in reads:
            raise ValueError(f"{package.path}: no task of it reads {name}")
        found = read_tensor_shapes(package.find_file(name))
        if found != wanted[name]:
            raise ValueError(f"{package.path}: {name} holds other weights than its tasks need")
    missing = reads - set(package.weights) - package.content.base.keys()
    if missing:
        raise ValueError(f"{package.path}: it has no {', '.join(sorted(missing))}")
    return files


def _flatten(outputs: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{task}/{name}": x for task, found in outputs.items() for name, x in found.items()}
