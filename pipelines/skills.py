"""``skillnet pack``, ``add``, ``remove`` and ``skills``: skills that travel as files.

    skillnet pack counting-run --output stroke-count.skill     a task of a grown model, as a file
    skillnet add stroke-count.skill --to my-model              joins it, and compares every output
    skillnet skills my-model                                   what the model has, and what it costs
    skillnet skills s3://bucket/skills --fits my-model         what a catalogue offers
    skillnet remove stroke-count --from my-model               every file has its former bytes

A model is a folder that ``skillnet export --to hf`` or ``save_pretrained`` wrote.
:mod:`skillnet.skill_packages` has the format.
"""

import contextlib
import math
import shutil
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.training.config.resources import request_model
from skillnet_platform import __version__, console
from skillnet_platform.cli import command
from skillnet_platform.config import aliased_field, positional_field
from skillnet_platform.errors import UserError

if TYPE_CHECKING:
    from pipelines.serving.skill_catalogues import CatalogueEntry
    from skillnet.multitask_model import TaskModel
    from skillnet.skill_packages import PackageContent, SkillPackage
    from skillnet.skill_proofs import RowReader, TaskProof


@dataclass
class PackConfig:
    """Options of ``skillnet pack``.

    Args:
        model: a grown model: a run, a registry address, a checkpoint, or a folder.
        tasks: to pack, with the skills that no other task of the model activates; by default those
            that the run trained.
        output: file to write; by default named after the first task.
        data: directory or URI of prepared corpora; by default those of its run.
        tracking_uri: MLflow tracking URI; by default as in training.
    """

    model: str = positional_field()
    tasks: list[str] = field(default_factory=list)
    output: str | None = None
    data: str | None = None
    tracking_uri: str | None = None


@dataclass
class AddConfig:
    """Options of ``skillnet add``.

    Args:
        packages: files or URIs, or NAME@PLACE of a package in a folder, an object store, or a
            repository of the Hugging Face Hub (hf:OWNER/NAME@REVISION).
        to: folder of the model, which is replaced at once.
        data: directory or URI of prepared corpora, on whose test rows old tasks are compared; by
            default the usual one. Tasks without their corpus are compared on generated inputs.
    """

    packages: list[str] = positional_field([])
    to: str = ""
    data: str | None = None

    def __post_init__(self) -> None:
        if not self.packages:
            raise UserError("packages: give at least one, such as stroke-count.skill")
        _require_model(self.to, "--to")


@dataclass
class RemoveConfig:
    """Options of ``skillnet remove``.

    Args:
        names: packages to remove; `skillnet skills MODEL` lists them.
        model: folder of the model, which is replaced at once.
        data: as of `skillnet add`.
    """

    names: list[str] = positional_field([])
    model: str = aliased_field("", "from")
    data: str | None = None

    def __post_init__(self) -> None:
        if not self.names:
            raise UserError("names: give at least one; `skillnet skills MODEL` lists them")
        _require_model(self.model, "--from")


@dataclass
class SkillsConfig:
    """Options of ``skillnet skills``.

    Args:
        place: folder of a model, or a catalogue: a folder, a URI, or hf:OWNER/NAME@REVISION.
        fits: folder of a model that the packages of a catalogue are compared with.
    """

    place: str = positional_field()
    fits: str | None = None

    def __post_init__(self) -> None:
        if self.fits is not None:
            _require_model(self.fits, "--fits")
            if _is_model(self.place):
                raise UserError(f"--fits compares packages; {self.place} is a model, no catalogue")


def _require_model(given: str, option: str) -> None:
    """Raise UserError unless an option names the folder of a saved model."""
    if not given:
        raise UserError(f"{option}: give the folder of a model")
    if not _is_model(given):
        raise UserError(
            f"{option} {given}: no saved model. Write one: skillnet export --model {given} --to hf "
            "--output FOLDER"
        )


def _is_model(place: str) -> bool:
    return (Path(place) / "manifest.json").is_file()


# -- pack ----------------------------------------------------------------------------------


def show_package(result: "tuple[Path, PackageContent]") -> None:
    """Print what was packed.

    Args:
        result: location and content of the package.
    """
    path, content = result
    rows = [
        [task, ", ".join(content.skills) or "–", packed.parameters, packed.flops, len(content.base)]
        for task, packed in content.tasks.items()
    ]
    columns = ["task", "new skills", "parameters", "operations", "base files"]
    console.print_table(f"{path}: {path.stat().st_size / 1e6:.2f} MB", columns, rows)


@command(
    PackConfig,
    name="pack",
    description="Write a task of a grown model, its skills and its head as one file, with the "
    "digest of every file of the base that it needs. `skillnet add` joins it to that base.",
    example="skillnet pack counting-run\n"
    "skillnet pack counting-run --tasks stroke_count --output stroke-count.skill",
    show=show_package,
    to_json=lambda result: {"package": str(result[0]), "content": result[1]},
    resources=lambda config: request_model(config.model, config.data),
)
def pack_tasks(config: PackConfig) -> "tuple[Path, PackageContent]":
    """Run ``skillnet pack``."""
    from pipelines.training.runs import model_source

    source = model_source.resolve_model(config.model, config.tracking_uri)
    # torch loads here: --help and wrong names do not need it.
    from pipelines.serving.bundle import find_bundle
    from skillnet.bounds import PACKAGE_SUFFIX
    from skillnet.skill_packages import pack_skills

    bundle, manifest = find_bundle(source, source.find_corpora(config.data))
    tasks = config.tasks or _find_trained_tasks(source.settings, config.model)
    target = Path(config.output or f"{tasks[0].replace('_', '-')}{PACKAGE_SUFFIX}")
    serving = {task: entry for task, entry in manifest["tasks"].items() if task in tasks}
    content = pack_skills(
        bundle,
        tasks,
        target,
        program=__version__,
        serving=serving,
        evaluation=manifest["evaluation"],
    )
    return target, content


def _find_trained_tasks(settings: dict[str, Any], model: str) -> list[str]:
    """Return the tasks that a growth trained.

    Raises:
        UserError: the settings do not tell them.
    """
    given = settings.get("tasks")
    tasks = given if isinstance(given, dict) else {}
    trained = [
        name for name, task in tasks.items() if isinstance(task, dict) and not task.get("eval_only")
    ]
    if not trained or len(trained) == len(tasks):
        raise UserError(f"{model}: no growth. Name the tasks to pack: --tasks NAME")
    return trained


# -- add and remove ------------------------------------------------------------------------


def show_proofs(proofs: "list[TaskProof]") -> None:
    """Print the comparison of every task.

    Args:
        proofs: result of a change.
    """
    rows = [
        [
            proof.task,
            proof.package or "–",
            proof.inputs,
            proof.rows,
            proof.differing,
            "–" if proof.package is None else f"{proof.largest:.1g}",
            proof.parameters,
            proof.flops,
        ]
        for proof in proofs
    ]
    columns = [
        "task", "package", "inputs", "rows", "differing", "to author", "parameters", "operations"
    ]  # fmt: skip
    caption = "Old tasks: outputs before and after, bit by bit."
    if any(proof.package for proof in proofs):
        caption += " Tasks of packages: difference to the outputs of their author."
    console.print_table("outputs", columns, rows, caption)


@command(
    AddConfig,
    name="add",
    description="Join packages of skills to a saved model, all or none. Each must have been made "
    "from this base, which digests prove. The outputs of every old task are compared bit by bit.",
    example="skillnet add stroke-count.skill --to my-model\n"
    "skillnet add stroke-count@s3://bucket/skills radical@hf:owner/skills@v1 --to my-model",
    show=show_proofs,
)
def join_packages(config: AddConfig) -> "list[TaskProof]":
    """Run ``skillnet add``."""
    from pipelines.serving.skill_catalogues import fetch_package
    from skillnet.package_joins import add_packages
    from skillnet.skill_packages import open_package

    folder = Path(config.to)
    with contextlib.ExitStack() as stack:
        packages: list[SkillPackage] = []
        for number, given in enumerate(config.packages):
            path = stack.enter_context(fetch_package(given, folder))
            scratch = folder.parent / f".{folder.name}.package-{number}"
            packages.append(stack.enter_context(open_package(path, scratch)))
        rows = _find_rows(folder, config.data)
        return add_packages(folder, packages, partial(_write_manifest, packages), rows)


@command(
    RemoveConfig,
    name="remove",
    description="Remove packages of skills from a saved model, all or none. Every file then has "
    "the bytes of before, and the outputs of the other tasks are compared bit by bit.",
    example="skillnet remove stroke-count --from my-model",
    show=show_proofs,
)
def drop_packages(config: RemoveConfig) -> "list[TaskProof]":
    """Run ``skillnet remove``."""
    from skillnet.package_joins import remove_packages

    folder = Path(config.model)
    rows = _find_rows(folder, config.data)
    return remove_packages(folder, config.names, partial(_write_manifest, []), rows)


#: Test rows of a corpus on which the outputs of a task are compared.
TEST_ROWS = 128


def _find_rows(folder: Path, data: str | None) -> "RowReader | None":
    """Return a reader of the test rows of those tasks of a bundle whose corpora are at hand.

    Raises:
        UserError: a given directory has no corpus of the model.
    """
    from pipelines.data.shards.dataset import open_corpus
    from pipelines.training.growth.verification import digest_row_outputs
    from pipelines.training.runs.bundle_manifest import SERVING, read_bundle_manifest
    from skillnet.serialization import read_manifest
    from skillnet.skill_proofs import RowDigests
    from skillnet_platform.storage import data_root
    from skillnet_platform.storage.location import join_location, parse_location

    entries: dict[str, Any] = {}
    if SERVING in read_manifest(folder):
        entries = read_bundle_manifest(folder)["tasks"]
    corpora = {}
    for task, entry in entries.items():
        # A corpus that is missing or damaged is not at hand.
        with contextlib.suppress(ValueError, OSError):
            where = join_location(parse_location(data, data_root()), entry["corpus"])
            corpus = open_corpus(where)
            if corpus.digest == entry["corpus_digest"] and "test" in corpus.splits:
                corpora[task] = corpus
    if data and not corpora:
        known = sorted({entry["corpus"] for entry in entries.values()})
        raise UserError(
            f"--data {data}: no corpus that {folder} was trained on"
            + (f": {', '.join(known)}. Give their folder, or leave the option out" if known else "")
        )

    def read(model: "TaskModel", task: str) -> RowDigests | None:
        if task not in corpora:
            return None
        limit = entries[task]["limit"]
        digests = digest_row_outputs(model, task, corpora[task], "test", limit, TEST_ROWS)
        return RowDigests(f"{corpora[task].name}/test", digests)

    return read if corpora else None


def _write_manifest(packages: "list[SkillPackage]", folder: Path, manifest: dict[str, Any]) -> None:
    """Write ``manifest.json`` of a changed model, with a complete entry ``serving`` of a bundle.

    Args:
        packages: that were added.
        folder: directory of the model.
        manifest: its content.
    """
    from pipelines.training.runs.bundle_manifest import (
        SERVING,
        read_bundle_manifest,
        write_sealed,
    )
    from skillnet.router import load_counts, name_counts
    from skillnet.serialization import commit_manifest, describe_files

    if SERVING not in manifest:
        commit_manifest(folder, manifest)
        return
    serving = dict(manifest[SERVING])
    entries = {k: v for k, v in serving["tasks"].items() if k in manifest["tasks"]}
    rows = [row for row in serving["evaluation"] if row["task"] in manifest["tasks"]]
    gone = {name_counts(task) for task in serving["tasks"].keys() - entries.keys()}
    files = {name: each for name, each in serving["files"].items() if name not in gone}
    for name in serving["files"].keys() & gone:
        (folder / name).unlink()
    for package in packages:
        for name, path in package.inputs.items():
            load_counts(path)
            shutil.copyfile(path, folder / name)
            files |= describe_files(folder, [name])
        for task, packed in package.content.tasks.items():
            if packed.serving is None:
                raise UserError(
                    f"{package.path}: {task} has no settings for predictions; pack it from a run "
                    "or an export"
                )
            entries[task] = packed.serving
            rows += packed.evaluation
    serving |= {"tasks": entries, "evaluation": rows, "files": files}
    write_sealed(folder, manifest | {SERVING: serving})
    # A package of a stranger has these entries, too.
    read_bundle_manifest(folder)


# -- skills --------------------------------------------------------------------------------


@dataclass(frozen=True)
class SkillEntry:
    """A skill of a model.

    Args:
        name: key of the skill in the model.
        package: that brought it; None for a skill of the base.
        parameters: number of its weights.
        tasks: that activate it.
    """

    name: str
    package: str | None
    parameters: int
    tasks: list[str]


def list_skills(folder: Path) -> list[SkillEntry]:
    """Return the skills of a saved model, with their origin and size.

    Args:
        folder: directory of the model.

    Raises:
        ValueError: the model is damaged.
    """
    from skillnet.package_joins import list_packages
    from skillnet.serialization import read_config, read_manifest, read_tensor_shapes

    config, _, _ = read_config(folder, read_manifest(folder))
    origin = {s: name for name, each in list_packages(folder).items() for s in each.skills}
    entries = []
    for skill in config.skills:
        shapes = read_tensor_shapes(folder / f"skill-{skill}.safetensors").values()
        users = [task for task, spec in config.tasks.items() if skill in spec.skills]
        entries.append(SkillEntry(skill, origin.get(skill), sum(map(math.prod, shapes)), users))
    return entries


def show_skills(entries: "list[SkillEntry] | list[CatalogueEntry]") -> None:
    """Print the skills of a model, or the packages of a catalogue.

    Args:
        entries: at least one.
    """
    if isinstance(entries[0], SkillEntry):
        rows = [[e.name, e.package or "base", e.parameters, ", ".join(e.tasks)] for e in entries]  # type: ignore[union-attr]
        console.print_table("skills", ["skill", "package", "parameters", "tasks"], rows)
        return
    listed: list[CatalogueEntry] = entries  # type: ignore[assignment]
    rows = [
        [
            entry.name,
            ", ".join(entry.tasks) or "–",
            ", ".join(entry.skills) or "–",
            f"{entry.bytes / 1e6:.2f} MB",
            (entry.base or "–")[:16],
            ", ".join(entry.licences) or "–",
            "no" if entry.problem else "yes",
        ]
        for entry in listed
    ]
    columns = ["package", "tasks", "skills", "size", "base", "licences", "usable"]
    console.print_table("packages", columns, rows)
    for entry in listed:
        if entry.problem:
            console.print_note(entry.problem)


@command(
    SkillsConfig,
    name="skills",
    description="List the skills of a saved model: the package that brought each, its parameters, "
    "and the tasks that activate it. Or list the packages of a catalogue, from their headers.",
    example="skillnet skills my-model\nskillnet skills s3://bucket/skills --fits my-model",
    show=show_skills,
    to_json=lambda entries: [asdict(entry) for entry in entries],
)
def print_skills(config: SkillsConfig) -> "list[SkillEntry] | list[CatalogueEntry]":
    """Run ``skillnet skills``."""
    if _is_model(config.place):
        return list_skills(Path(config.place))
    from pipelines.serving.skill_catalogues import list_catalogue

    return list_catalogue(config.place, Path(config.fits) if config.fits else None)
