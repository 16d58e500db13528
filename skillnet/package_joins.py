"""Models to which packages of skills are added, and from which they are removed.

Files of the model that stay are hard links, new ones are copies, and ``config.json`` and
``manifest.json`` are written in one form. So removing restores the bytes of every file.
:mod:`skillnet.skill_packages` reads packages.
"""

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import StrictStr, TypeAdapter, ValidationError, with_config

from skillnet.config import SkillNetConfig
from skillnet.model import SkillNet
from skillnet.serialization import (
    PACKAGES,
    commit_manifest,
    config_to_dict,
    describe_files,
    format_about,
    load_tensors,
    read_about,
    read_config,
    read_manifest,
    save_model,
)
from skillnet.skill_packages import (
    CLOSED,
    PROBES,
    Name,
    Sha,
    SkillPackage,
    check_base,
    describe_wrong_value,
    join_config,
    join_vocabulary,
    open_package,
    require_shapes,
)
from skillnet.skill_proofs import (
    RowReader,
    TaskProof,
    compare_outputs,
    probe_outputs,
    prove_task,
    take_outputs,
)
from skillnet.skills import nearest_hint
from skillnet.vocabulary import ModelVocabulary, parse_vocabulary
from skillnet_files.commit import commit_directory, link_or_copy, make_scratch_directory

#: Largest difference of an output to that of the author, relative to the largest output or 1:
#: processors round differently.
TOLERANCE = 1e-3


@with_config(CLOSED)
@dataclass(frozen=True)
class AddedPackage:
    """Entry of a package in the manifest of a model.

    Args:
        digest: see :class:`SkillPackage`.
        files: weights of the model that only packages need.
        skills: that it added.
        tasks: that it added.
    """

    digest: Sha
    files: list[StrictStr]
    skills: list[Name]
    tasks: list[Name]


#: Writes the manifest of a changed model; a bundle has a digest of its own in it.
ManifestWriter = Callable[[Path, dict[str, Any]], None]


def add_packages(
    folder: Path,
    packages: Sequence[SkillPackage],
    write: ManifestWriter = commit_manifest,
    read_rows: RowReader | None = None,
    name: str | None = None,
) -> list[TaskProof]:
    """Add packages to a saved model, all or none, and compare the outputs of every task.

    Args:
        folder: directory of the model; it is replaced at once.
        packages: opened packages.
        write: writes the manifest.
        read_rows: computes outputs of old tasks on rows; None compares generated inputs.
        name: words for the model in messages; None takes the folder.

    Returns:
        The comparison of each task: old tasks before and after, new tasks with their authors'.

    Raises:
        ValueError: a package does not fit the model, or an output changed; the model is as before.
    """
    manifest = read_manifest(folder)
    about, config = _read_canonical(folder, manifest)
    installed = _parse_packages(manifest, folder)
    # Files of the base stay when packages go that bring them, too.
    added = {name for entry in installed.values() for name in entry.files}
    hashes = {name: entry["sha256"] for name, entry in manifest["files"].items()}
    known, task_files = dict(manifest["files"]), dict(manifest.get("tasks", {}))
    vocabulary = parse_vocabulary(about.get("vocabulary"))
    placed: dict[str, Path] = {}
    for package in packages:
        content = package.content
        config = _join_config(config, package, installed, hashes, vocabulary, name or str(folder))
        task_files |= require_shapes(package, config)
        for file in package.weights:
            entry = content.files[file]
            if file not in known:
                hashes[file] = entry.sha256
                placed[file] = package.find_file(file)
                known[file] = {"bytes": entry.bytes, "sha256": entry.sha256}
                added.add(file)
        vocabulary = join_vocabulary(vocabulary, package)
        files = [file for file in package.weights if file in added]
        installed[content.name] = AddedPackage(
            package.digest, files, content.skills, list(content.tasks)
        )
    about |= config_to_dict(config) | {"vocabulary": vocabulary.to_dict()}
    changed = _record(manifest, installed, task_files)
    # The model that a user would load, not parts of it.
    with _changed_folder(folder, manifest, about, known, changed, placed, write) as staging:
        # One model at a time is in memory.
        before = take_outputs(_load(folder), read_rows)
        after = _load(staging)
        proofs = compare_outputs(before, after, read_rows)
        for package in packages:
            proofs += check_probes(after, package)
    return proofs


def remove_packages(
    folder: Path,
    names: Sequence[str],
    write: ManifestWriter = commit_manifest,
    read_rows: RowReader | None = None,
    where: str | None = None,
) -> list[TaskProof]:
    """Remove packages from a saved model, all or none, and compare the outputs of the other tasks.

    Args:
        folder: directory of the model; it is replaced at once.
        names: keys of packages that were added.
        write: writes the manifest.
        read_rows: as of :func:`add_packages`.
        where: words for the model in messages; None takes the folder.

    Returns:
        The comparison of each task that stays.

    Raises:
        ValueError: a package is not there, or an output changed; the model is as before.
    """
    manifest = read_manifest(folder)
    about, config = _read_canonical(folder, manifest)
    installed = _parse_packages(manifest, folder)
    known, task_files = dict(manifest["files"]), dict(manifest.get("tasks", {}))
    skills: list[str] = []
    tasks: list[str] = []
    for name in names:
        entry, gone = _pop_package(installed, name, where or str(folder))
        skills, tasks = skills + entry.skills, tasks + entry.tasks
        for file in gone:
            known.pop(file, None)
        for task in entry.tasks:
            task_files.pop(task, None)
    try:
        config = config.without(skills, tasks)
    except ValueError as error:
        raise ValueError(f"{where or folder}: {', '.join(names)}: {error}") from None
    vocabulary = parse_vocabulary(about.get("vocabulary")).restrict_to(config.tasks)
    about |= config_to_dict(config) | {"vocabulary": vocabulary.to_dict()}
    changed = _record(manifest, installed, task_files)
    with _changed_folder(folder, manifest, about, known, changed, {}, write) as staging:
        before = take_outputs(_load(folder), read_rows)
        return compare_outputs(before, _load(staging), read_rows)


def explain_misfits(folder: Path, packages: Sequence[SkillPackage]) -> list[str | None]:
    """Return why each package cannot be added to a saved model alone; None if its header fits.

    Args:
        folder: directory of the model.
        packages: their headers suffice.

    Raises:
        ValueError: the model is damaged.
    """
    manifest = read_manifest(folder)
    about, config = _read_canonical(folder, manifest)
    installed = _parse_packages(manifest, folder)
    hashes = {name: entry["sha256"] for name, entry in manifest["files"].items()}
    vocabulary = parse_vocabulary(about.get("vocabulary"))
    reasons: list[str | None] = []
    for package in packages:
        try:
            _join_config(config, package, installed, hashes, vocabulary, str(folder))
            join_vocabulary(vocabulary, package)
            reasons.append(None)
        except ValueError as error:
            reasons.append(str(error))
    return reasons


def _join_config(
    config: SkillNetConfig,
    package: SkillPackage,
    installed: Mapping[str, AddedPackage],
    hashes: Mapping[str, str],
    vocabulary: ModelVocabulary,
    where: str,
) -> SkillNetConfig:
    """Return the configuration of a saved model with a package that has its base."""
    name = package.name
    if name in installed:
        raise ValueError(
            f"{package.path}: {where} already has a package {name!r}. Remove it first: "
            f"skillnet remove {name} --from {where}"
        )
    joined = join_config(config, package, where)
    check_base(package, hashes, vocabulary.tokenizer, where)
    return joined


def list_packages(folder: Path) -> dict[str, AddedPackage]:
    """Return the packages of a saved model by name.

    Args:
        folder: directory of the model.

    Raises:
        ValueError: the manifest is damaged.
    """
    return _parse_packages(read_manifest(folder), folder)


def _parse_packages(manifest: Mapping[str, Any], where: object) -> dict[str, AddedPackage]:
    try:
        return TypeAdapter(dict[str, AddedPackage]).validate_python(manifest.get(PACKAGES, {}))
    except ValidationError as error:
        raise ValueError(f"{where}: {PACKAGES}.{describe_wrong_value(error)}") from None


def _pop_package(
    installed: dict[str, AddedPackage], name: str, model: str
) -> tuple[AddedPackage, set[str]]:
    """Take a package out of those of a model; return it, and the files that no other one needs."""
    if name not in installed:
        raise ValueError(f"{model} has no package {name!r}{nearest_hint(name, sorted(installed))}")
    entry = installed.pop(name)
    # A stem may have come with several packages, and goes with the last of them.
    kept = {file for other in installed.values() for file in other.files}
    return entry, set(entry.files) - kept


def _record(
    manifest: Mapping[str, Any],
    installed: Mapping[str, AddedPackage],
    task_files: Mapping[str, list[str]],
) -> dict[str, Any]:
    changed = {**manifest, "tasks": dict(task_files)}
    changed.pop(PACKAGES, None)
    if installed:
        changed[PACKAGES] = {name: dataclasses.asdict(entry) for name, entry in installed.items()}
    return changed


def _read_canonical(
    folder: Path, manifest: dict[str, Any]
) -> tuple[dict[str, Any], SkillNetConfig]:
    """Return ``config.json`` and the configuration of a model that packages can be added to."""
    config, system, _ = read_config(folder, manifest)
    if system != SkillNet.system:
        raise ValueError(f"{folder}: system {system} has no skills; give a skillnet model")
    about = read_about(folder, manifest)
    if (folder / "config.json").read_text(encoding="utf-8") != format_about(about):
        raise ValueError(
            f"{folder}: config.json was not written by this program, so removing a package could "
            "not restore it. Save the model again"
        )
    return about, config


@contextmanager
def _changed_folder(
    folder: Path,
    manifest: Mapping[str, Any],
    about: Mapping[str, Any],
    known: Mapping[str, Any],
    changed: dict[str, Any],
    placed: Mapping[str, Path],
    write: ManifestWriter,
) -> Iterator[Path]:
    """Provide the changed model in a folder, which replaces the old one when the block ends."""
    with make_scratch_directory(folder) as staging:
        for path in sorted(folder.rglob("*")):
            name = str(path.relative_to(folder))
            is_dropped = name in manifest["files"] and name not in known
            if path.is_file() and name not in ("config.json", "manifest.json") and not is_dropped:
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(path, staging / name)
        for name, path in placed.items():
            shutil.copyfile(path, staging / name)
        (staging / "config.json").write_text(format_about(about), encoding="utf-8")
        changed["files"] = {**known, **describe_files(staging, ["config.json"])}
        write(staging, changed)
        yield staging
        # Reached only if the proofs of the block hold.
        commit_directory(staging, folder)


def _load(folder: Path) -> SkillNet:
    return SkillNet.from_pretrained(folder)


# -- models in memory ----------------------------------------------------------------------


def join_package(model: SkillNet, path: Path) -> list[TaskProof]:
    """Add a package to a model in memory, or leave it as it is; see :func:`add_packages`.

    Saving the model gives the files that :func:`add_packages` gives.

    Args:
        model: in the type of its saved weights; it is in evaluation mode afterwards.
        path: location of the package.

    Raises:
        ValueError: the package does not fit the model, or an output changed.
    """
    with tempfile.TemporaryDirectory() as folder, open_package(path, Path(folder) / "x") as package:
        if package.name in model.packages:
            raise ValueError(f"{path}: the model already has a package {package.name!r}")
        return _change_files(model, lambda files: add_packages(files, [package], name="the model"))


def drop_package(model: SkillNet, name: str) -> list[TaskProof]:
    """Remove a package from a model in memory; see :func:`remove_packages`.

    Args:
        model: that has the package; it is in evaluation mode afterwards.
        name: key of the package.

    Raises:
        ValueError: the package is not there.
    """
    return _change_files(model, lambda files: remove_packages(files, [name], where="the model"))


def _change_files(model: SkillNet, change: Callable[[Path], list[TaskProof]]) -> list[TaskProof]:
    """Change a model by way of its files, so that a refused change leaves it as it was."""
    some, origin = next(model.parameters()), model.origin
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        save_model(model, folder)
        proofs = change(folder)
        changed = _load(folder).to(some.device)
    model.__dict__.update(changed.__dict__)
    model.origin = origin
    return proofs


def check_probes(model: SkillNet, package: SkillPackage) -> list[TaskProof]:
    """Compare the outputs of the new tasks with those that their author measured.

    Args:
        model: with the package, in evaluation mode.
        package: an opened package.

    Raises:
        ValueError: an output is missing, or differs by more than processors round.
    """
    stored = load_tensors(package.find_file(PROBES))
    tasks = list(package.content.tasks)
    proofs = []
    for task, outputs in probe_outputs(model, tasks).items():
        expected = {name: stored.get(f"{task}/{name}") for name in outputs}
        fits = all(x is not None and x.shape == outputs[name].shape for name, x in expected.items())
        if not fits:
            raise ValueError(f"{package.path}: {PROBES} has no outputs of {task}")
        proof = prove_task(model, task, expected, outputs, package.name)  # type: ignore[arg-type]
        if not proof.largest <= TOLERANCE:
            raise ValueError(
                f"{package.path}: {task} computes other outputs than its author measured "
                f"(largest difference {proof.largest:.2g})"
            )
        proofs.append(proof)
    return proofs
