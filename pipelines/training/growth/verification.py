"""Comparison of grown and merged models with their sources: files, metrics, outcomes, outputs.

``skillnet grow`` calls :func:`build_growth_report` after training, and
:func:`assert_frozen_unchanged` then fails the command if an old part changed. ``skillnet merge``
opens its models with :func:`open_merge_sources` and compares the outputs of every task with
:func:`build_merge_report`.
"""

import contextlib
import functools
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.data.shards.dataset import PreparedCorpus, open_corpus
from pipelines.training.config.growth import MergeConfig
from pipelines.training.config.run import FinetuneConfig, TaskTraining
from pipelines.training.evaluation import tables
from pipelines.training.evaluation.evaluator import (
    choose_splits,
    evaluate_model,
    locate_task_corpus,
    uses_all_captions,
)
from pipelines.training.evaluation.inference import batches_by_length, send_batch, split_inputs
from pipelines.training.evaluation.outcomes import (
    OUTCOMES_FILE,
    OutcomeTable,
    paired_difference,
    read_outcomes,
)
from pipelines.training.growth.report import (
    GROWN,
    FileState,
    GrowthReport,
    MergedFile,
    MergeReport,
    TaskComparison,
    TaskState,
    TransferResult,
)
from pipelines.training.loading.task_columns import is_row_tower, tower_column
from pipelines.training.runs import model_source
from pipelines.training.runs.identity import find_identity_differences
from pipelines.training.runs.layout import (
    CONFIG,
    RESULT,
    SOURCE,
    SOURCE_ROWS,
    is_unused,
    read_result,
)
from pipelines.training.runs.model_source import ModelSource
from pipelines.training.runs.vocabulary_match import align_outputs
from skillnet import systems
from skillnet.model import SkillNet
from skillnet.model_merging import MergeParent, MergePlan, read_parent
from skillnet.multitask_model import TaskModel
from skillnet.objectives.base import find_objective
from skillnet.serialization import hash_file, read_manifest, read_tensor_shapes, save_model
from skillnet.skills import Task, find_task
from skillnet_platform.config import build_config, load_yaml
from skillnet_platform.errors import UserError
from skillnet_platform.storage import data_root, read_json, scratch_directory
from skillnet_platform.storage.location import join_location, parse_location

#: Columns of an evaluation row that must not change; the others describe the measurement.
COMPARED_COLUMNS = ("value", "low", "high", "activated_params", "flops_per_example")


def added_files(before: SkillNet, grown: SkillNet) -> list[str]:
    """Return the files that growth added: of the new skill, the new head, and possibly a stem.

    Args:
        before: the source model.
        grown: the grown model.
    """
    return sorted(grown.files_of().keys() - before.files_of().keys())


def compare_files(source: ModelSource, before: SkillNet, folder: Path) -> list[FileState]:
    """Compare the weight files of the source with those of a saved model, by sha256.

    The hashes of the source come from its manifest, which was checked when the model was loaded. A
    checkpoint with averaged weights does not contain the averages as model files; their hash is
    computed as if they were saved.

    Args:
        source: the source model.
        before: the source model in memory.
        folder: directory of the saved model.
    """
    listed = read_manifest(source.weights)["files"]
    if any(name.startswith("average-") for name in listed):
        old = {file: _hash_parameters(before, names) for file, names in before.files_of().items()}
    else:
        old = {file: listed[f"{file}.safetensors"]["sha256"] for file in before.files_of()}
    # The written files are hashed, because the next user of the model reads these.
    new = {path.stem: hash_file(path) for path in sorted(folder.glob("*.safetensors"))}
    return [
        FileState(file, old.get(file), new.get(file))
        for file in [*old, *sorted(new.keys() - old.keys())]
    ]


def assert_files_unchanged(files: Sequence[FileState]) -> None:
    """Check that every old file has the same bytes.

    Args:
        files: result of :func:`compare_files`.

    Raises:
        RuntimeError: a file changed. This is a defect, or another version of safetensors wrote the
            source.
    """
    for file in files:
        if file.state not in ("same", "new"):
            raise RuntimeError(
                f"{file.file} is {file.state}: sha256 {file.before} before, {file.after} after"
            )


def assert_frozen_unchanged(report: GrowthReport) -> None:
    """Check that only new files changed, and that all results of the old tasks are equal.

    Args:
        report: collected findings of the growth.

    Raises:
        RuntimeError: names the first difference.
    """
    assert_files_unchanged(report.files)
    for task in report.tasks:
        if not task.is_unchanged:
            raise RuntimeError(
                f"{task.task} {task.split} {task.metric} was {task.before} and is {task.after}"
            )
    if not report.is_unchanged:
        raise RuntimeError(
            f"the outcomes of {report.rows_changed} rows of old tasks changed; the optimizer kept "
            f"state for {', '.join(report.optimizer_files)}"
        )


def build_growth_report(
    source: ModelSource,
    before: SkillNet,
    settings: FinetuneConfig,
    run: Path,
    result: Mapping[str, Any],
    references: Mapping[str, Mapping[str, Any]],
    added: tuple[str, str],
) -> GrowthReport:
    """Compare the source model with the grown model.

    Args:
        source: the source model.
        before: the source model in memory.
        settings: configuration of the run.
        run: folder of the run, with the final model and ``outcomes.parquet``.
        result: outcome of the run.
        references: name of each reference run -> its result.
        added: names of the new skill and the new task.
    """
    skill, task = added
    spec = settings.model.tasks[task]
    old_rows, old_outcomes = _read_source_evaluation(run)
    own_outcomes = read_outcomes(run / OUTCOMES_FILE)
    compared = changed = 0
    for key in old_outcomes:
        one, other = old_outcomes[key], own_outcomes[key]
        # Frozen parts must give equal numbers, so no tolerance is allowed.
        unchanged = (one.numerator == other.numerator) & (one.denominator == other.denominator)
        compared, changed = compared + len(one), changed + int((~unchanged).sum())
    # Step numbers have leading zeros, so the last name is the last step.
    checkpoint = max((run / "checkpoints").glob("step-*"))
    results = {GROWN: result, **references}
    # Read from disk: the report is about the written files, not about a model in memory.
    model = systems.load_model(run / "model")
    low_rank = settings.model.low_rank_skills.get(skill)
    return GrowthReport(
        source=source.name,
        source_digest=source.digest,
        skill=skill,
        task=task,
        corpus=settings.tasks[task].corpus,
        objective=spec.objective,
        steps=int(result["step"]),
        seed=settings.seed,
        total_params=sum(p.numel() for p in model.parameters()),
        files=compare_files(source, before, run / "model"),
        tasks=_compare_rows(old_rows, result["evaluation"]),
        rows_compared=compared,
        rows_changed=changed,
        optimizer_files=sorted(
            path.stem.removeprefix("optimizer-")
            for path in checkpoint.glob("optimizer-*.safetensors")
        ),
        transfer_results=[
            transfer
            for name, run_result in results.items()
            for transfer in _compare_transfer(
                name, run_result, own_outcomes, old_rows, task, spec, settings
            )
        ],
        rank=low_rank.rank if low_rank else 0,
        chosen={row["task"]: row["metric"] for row in old_rows if "score" in row},
    )


def _read_source_evaluation(run: Path) -> tuple[list[dict[str, Any]], OutcomeTable]:
    """Read how the workers of the run measured the source, as they measured the grown model.

    The numbers of the source's own run are not used: another machine may round differently, and
    the comparison is exact.
    """
    if not (run / SOURCE_ROWS).is_file():
        return [], OutcomeTable()
    return read_json(run / SOURCE_ROWS), read_outcomes(run / f"{SOURCE}-{OUTCOMES_FILE}")


def _compare_rows(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]
) -> list[TaskState]:
    rows_after = {(row["task"], row["split"], row["metric"]): row for row in after}
    states = []
    for row in before:
        # A metric that is absent after the growth counts as changed.
        other = rows_after.get((row["task"], row["split"], row["metric"]), {})
        is_unchanged = all(_equal(row[key], other.get(key)) for key in COMPARED_COLUMNS)
        states.append(
            TaskState(
                row["task"],
                row["split"],
                row["metric"],
                row["value"],
                other.get("value", float("nan")),
                is_unchanged,
            )
        )
    return states


def _compare_transfer(
    name: str,
    result: Mapping[str, Any],
    own: OutcomeTable,
    old_rows: Sequence[dict[str, Any]],
    task: str,
    spec: Task,
    settings: FinetuneConfig,
) -> list[TransferResult]:
    # The metric of the outcomes, whose difference is formed row by row.
    metric = find_objective(spec.objective).compared_metric(settings.tasks[task].metric).name
    outcomes = read_outcomes(Path(result["run"]) / OUTCOMES_FILE)
    rows = [r for r in result["evaluation"] if (r["task"], r["metric"]) == (task, metric)]
    transfers = []
    for row in rows:
        key = (task, row["split"])
        difference = [] if name == GROWN else list(paired_difference(own[key], outcomes[key]))
        transfers.append(
            TransferResult(
                system=name,
                split=row["split"],
                metric=metric,
                value=row["value"],
                low=row["low"],
                high=row["high"],
                difference=difference,
                trained_params=_count_trained(Path(result["run"])),
                seconds=float(result["seconds"]),
                regressions={}
                if name == GROWN
                else _primary_values(old_rows, result["evaluation"], settings),
            )
        )
    return transfers


def _count_trained(run: Path) -> int:
    """Return the number of trained parameters: those with an average in the optimizer state."""
    checkpoint = max((run / "checkpoints").glob("step-*"))
    total = 0
    for path in checkpoint.glob("optimizer-*.safetensors"):
        # The shape comes from the header, so no tensor is read.
        shapes = read_tensor_shapes(path)
        total += sum(math.prod(shapes[key]) for key in shapes if key.endswith("/exp_avg"))
    return total


def _primary_values(
    before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]], settings: FinetuneConfig
) -> dict[str, list[float]]:
    values = {}
    for task in settings.tasks:
        objective = settings.model.tasks[task].objective
        one, other = (tables.find_ranked_row(rows, task, objective)[0] for rows in (before, after))
        if one is not None and other is not None:
            values[task] = [float(one["value"]), float(other["value"])]
    return values


def _hash_parameters(model: SkillNet, names: Sequence[str]) -> str:
    from safetensors.torch import save

    # The bytes must be those of a saved file, which holds contiguous tensors.
    tensors = {name: model.get_parameter(name).detach().cpu().contiguous() for name in names}
    return hashlib.sha256(save(tensors)).hexdigest()


def _equal(one: Any, other: Any) -> bool:
    return bool(one == other) or (one != one and other != other)  # NaN is equal to NaN here


@torch.no_grad()
def digest_outputs(
    model: TaskModel, task: str, corpus: PreparedCorpus, split: str, limit: int | None = None
) -> str:
    """Return the SHA-256 of the raw outputs of a task on every row of a split.

    The outputs are logits, log-probabilities or unit vectors in full precision, before any
    decision that hides a difference.

    Args:
        model: in evaluation mode.
        task: name of the task.
        corpus: shards of the task.
        split: name of the split.
        limit: maximum length of a row in tokens or frames.
    """
    digest = hashlib.sha256()
    for rows, outputs in _iterate_outputs(model, task, corpus, split, limit):
        digest.update(rows.tobytes())
        digest.update(outputs.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def digest_row_outputs(
    model: TaskModel, task: str, corpus: PreparedCorpus, split: str, limit: int | None, count: int
) -> list[bytes]:
    """Return the SHA-256 of the raw outputs of a task on each of the first rows of a split.

    Args:
        model: in evaluation mode.
        task: name of the task.
        corpus: shards of the task.
        split: name of the split.
        limit: maximum length of a row in tokens or frames.
        count: largest number of rows.
    """
    digests: dict[int, Any] = {}
    for rows, outputs in _iterate_outputs(model, task, corpus, split, limit, count):
        for row, output in zip(rows.tolist(), outputs.contiguous().cpu().numpy(), strict=True):
            # A row may have several inputs: those of two towers, and several captions.
            digests.setdefault(row, hashlib.sha256()).update(output.tobytes())
    return [digests[row].digest() for row in sorted(digests)]


def _iterate_outputs(
    model: TaskModel,
    task: str,
    corpus: PreparedCorpus,
    split: str,
    limit: int | None,
    count: int | None = None,
) -> Iterator[tuple[np.ndarray, Tensor]]:
    spec = find_task(task, model.config.tasks)
    device = next(model.parameters()).device
    output = find_objective(spec.objective).output
    table = corpus.splits[split].table().slice(0, count)
    for tower, plan in spec.towers.items():
        inputs = split_inputs(
            table,
            plan,
            model.config,
            f"{corpus.name}/{split}",
            column=tower_column(spec, tower),
            all_captions=uses_all_captions(corpus),
            # The limit is about the corpus' own modality.
            limit=limit if is_row_tower(spec, tower) else None,
        )
        for rows in batches_by_length(inputs.lengths, 4096):
            batch = send_batch(inputs.load_batch(rows), device)
            if output:
                yield rows, model(task, {tower: batch})[output]
            else:
                yield rows, model.embed(task, tower, batch)


#: Configuration of a merge, in the folder of its run.
MERGE_FILE = "merge.yaml"


@dataclass(frozen=True)
class MergeSource:
    """One of the models of a merge.

    Args:
        source: the model, as the user named it.
        parent: its files, with the new names.
        renames: old name -> new name.
    """

    source: ModelSource
    parent: MergeParent
    renames: Mapping[str, str]

    @property
    def tasks(self) -> dict[str, str]:
        """Task of the model -> its name in the merged model."""
        old_names = {new: old for old, new in self.renames.items()}
        return {old_names.get(task, task): task for task in self.parent.config.tasks}


@contextlib.contextmanager
def open_merge_sources(
    config: MergeConfig, resolved: Sequence[ModelSource], scratch: Path
) -> Iterator[list[MergeSource]]:
    """Check the models of a merge, and rename their skills and tasks.

    A checkpoint with averaged weights has no files that a merge can copy. It is saved as a model
    first.

    Args:
        config: settings of the merge.
        resolved: its models, in order.
        scratch: path beside which these models lie while the block runs.

    Raises:
        UserError: a model is named twice or damaged, or no model has a renamed skill.
    """
    for source in resolved:
        source.require_own_splits("The evaluation of a merged model")
    if len({source.weights for source in resolved}) < len(resolved):
        raise UserError(f"{', '.join(config.models)}: a model is named twice")
    with scratch_directory(scratch) as folder:
        sources = []
        found: set[str] = set()
        for position, source in enumerate(resolved):
            weights = source.weights
            listed = read_manifest(weights)["files"]
            if any(name.startswith("average-") for name in listed):
                weights = folder / f"{position}"
                save_model(model_source.load_source_model(source).cpu(), weights)
            present = read_parent(weights, source.name).config
            wanted = config.renames_of(position)
            # A rename without a model number concerns those models that have the name.
            renames = {
                old: new
                for old, (new, must_have) in wanted.items()
                if must_have or old in present.skills or old in present.tasks
            }
            found |= renames.keys()
            sources.append(MergeSource(source, read_parent(weights, source.name, renames), renames))
        for old in {
            old for position in range(len(resolved)) for old in config.renames_of(position)
        }:
            if old not in found:
                raise UserError(
                    f"rename {old}: no model after the first has a skill or task {old!r}"
                )
        yield sources


def keep_task_settings(
    source: ModelSource, task: str, corpora: Mapping[str, str], name: str | None = None
) -> TaskTraining:
    """Return the settings to evaluate a task of a model, as in its training.

    Args:
        source: the model.
        task: one of its tasks.
        corpora: task -> corpus, if it differs from that of the training.
        name: new name of the task; None keeps it.

    Raises:
        UserError: the corpus of the task is unknown.
    """
    trained = (source.settings.get("tasks") or {}).get(task) or {}
    known = {name or task: trained["corpus"]} if trained else {}
    corpus = Path(str(locate_task_corpus("", name or task, {**known, **corpora}))).name
    limit, metric = trained.get("max_length"), trained.get("metric")
    return TaskTraining(corpus, max_length=limit, metric=metric, eval_only=True)


def build_merged_config(
    config: MergeConfig, sources: list[MergeSource], plan: MergePlan
) -> FinetuneConfig:
    """Return the configuration of the merged model's run: its tasks are evaluated, not trained.

    Args:
        config: settings of the merge.
        sources: its models.
        plan: files and tasks of the merge.

    Raises:
        UserError: the corpus of a task is unknown.
    """
    tasks: dict[str, TaskTraining] = {}
    for source in sources:
        for old, new in source.tasks.items():
            if new not in tasks:
                tasks[new] = keep_task_settings(source.source, old, config.corpora, new)
    digests: dict[str, str | None] = {}
    for name in {task.corpus for task in tasks.values()}:
        # A missing corpus is an error when it is evaluated: a finished merge needs none.
        with contextlib.suppress(ValueError, OSError):
            data = parse_location(config.data, data_root())
            digests[name] = open_corpus(join_location(data, name)).digest
    return FinetuneConfig(
        name=config.name or time.strftime("merge-%Y%m%d-%H%M%S"),
        run_dir=config.run_dir,
        data=config.data,
        corpora=digests,
        model=plan.config,
        tasks=tasks,
        tracking=config.tracking,
    )


def require_merge_folder(folder: Path) -> None:
    """Raise UserError if a folder is in use by another run than a merge.

    Args:
        folder: location of the run of a merge.
    """
    if not is_unused(folder) and not (folder / MERGE_FILE).is_file():
        raise UserError(f"{folder}: a run of this name exists; choose another --name")


def check_same_merge(
    config: MergeConfig, settings: FinetuneConfig, folder: Path, parents: list[str]
) -> None:
    """Check that an existing folder is of the same merge.

    Args:
        config: settings of this call.
        settings: result of :func:`build_merged_config`.
        folder: directory of the run.
        parents: digests of the models, in order.

    Raises:
        UserError: it is another run, or a merge with other models, options or corpora.
    """
    require_merge_folder(folder)
    stored = folder / MERGE_FILE
    before = build_config(MergeConfig, load_yaml(stored))
    options = ("rename", "without", "average_shared")
    differing = {
        key: (getattr(before, key), getattr(config, key))
        for key in options
        if getattr(before, key) != getattr(config, key)
    }
    result = folder / RESULT
    if result.is_file():
        # A model may have moved, so the weights decide.
        joined = [str(each["digest"]) for each in read_result(result).get("parents", [])]
        is_same = joined == parents
    else:
        is_same = before.models == config.models
    if not is_same:
        differing["models"] = before.models, config.models
    # Other options change the settings, which would only lengthen the message.
    if not differing and (folder / CONFIG).is_file():
        made = build_config(FinetuneConfig, load_yaml(folder / CONFIG))
        differing = find_identity_differences(made, settings)
    for key, (old, new) in differing.items():
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        raise UserError(
            f"the merge {settings.name} has {key} {old}, not {new}{more}; give another --name"
        )


def build_merge_report(
    sources: list[MergeSource],
    plan: MergePlan,
    settings: FinetuneConfig,
    weights: Path,
    on_split: Callable[[str, str, int, int], None],
    outcomes: OutcomeTable | None = None,
) -> tuple[MergeReport, list[dict[str, Any]]]:
    """Evaluate every task of every model before and after the merge, on every test row.

    Args:
        sources: models of the merge.
        plan: files and tasks of the merge.
        settings: result of :func:`build_merged_config`.
        weights: folder of the merged model.
        on_split: called before each pass over a split with the task, the split, its rows, and the
            rows of all passes that are left, its own included.
        outcomes: receives the outcome of every row of the merged model.

    Returns:
        The report, and the evaluation rows of the merged model.
    """
    merged = model_source.load_source_model(ModelSource(str(weights), weights))
    corpora = {name: task.corpus for name, task in settings.tasks.items()}
    limits = {name: task.max_length for name, task in settings.tasks.items()}
    sizes = {}
    for name, spec in merged.config.tasks.items():
        corpus = open_corpus(locate_task_corpus(str(settings.data), name, corpora))
        sizes[name] = sum(
            corpus.splits[each].rows for each in choose_splits(corpus, None, task=spec)
        )
    compared = sum(sizes[name] for source in sources for name in source.tasks.values())
    rows = evaluate_model(
        merged,
        str(settings.data),
        corpora=corpora,
        limits=limits,
        metrics={name: task.metric for name, task in settings.tasks.items()},
        on_split=lambda task, split, count, left: on_split(task, split, count, left + compared),
        outcomes=outcomes,
    )

    def begin_comparison(task: str, split: str, count: int) -> None:
        nonlocal compared
        on_split(task, split, count, compared)
        compared -= count

    # Parents share the tasks of their base, whose outputs after the merge are computed once.
    @functools.cache
    def digest_merged(task: str, split: str) -> str:
        corpus = open_corpus(locate_task_corpus(str(settings.data), task, corpora))
        return digest_outputs(merged, task, corpus, split, limits[task])

    comparisons: list[TaskComparison] = []
    for source in sources:
        model = model_source.load_source_model(source.source)
        for old, new in source.tasks.items():
            comparisons += _compare_task(
                source, model, digest_merged, (old, new), settings, rows, begin_comparison
            )
    files = read_manifest(weights)["files"]
    report = MergeReport(
        parents={source.source.name: source.source.digest for source in sources},
        total_params=sum(p.numel() for p in merged.parameters()),
        files=[
            MergedFile(
                file,
                [parent.name for parent in owners],
                files[f"{file}.safetensors"]["sha256"],
                file in plan.averaged,
            )
            for file, owners in plan.origins.items()
        ],
        tasks=comparisons,
    )
    return report, rows


def _compare_task(
    source: MergeSource,
    model: TaskModel,
    digest_merged: Callable[[str, str], str],
    names: tuple[str, str],
    settings: FinetuneConfig,
    rows: list[dict[str, Any]],
    on_split: Callable[[str, str, int], None],
) -> Iterator[TaskComparison]:
    """Yield the comparison of one task of a model, for each split."""
    old, new = names
    task = settings.tasks[new]
    corpus = open_corpus(locate_task_corpus(str(settings.data), new, {new: task.corpus}))
    align_outputs(model, old, corpus)
    spec = model.config.tasks[old]
    for split in choose_splits(corpus, None, task=spec):
        count = corpus.splits[split].rows
        on_split(new, split, count)
        before = digest_outputs(model, old, corpus, split, task.max_length)
        is_identical = before == digest_merged(new, split)
        row, metric = tables.find_ranked_row(rows, new, spec.objective, split)
        value = float("nan") if row is None else float(row["value"])
        before_value = value
        # Equal outputs have equal metrics, so only a changed task is evaluated again.
        if not is_identical:
            own = evaluate_model(
                model,
                str(settings.data),
                [old],
                [split],
                corpora={old: task.corpus},
                limits={old: task.max_length},
                bootstrap_samples=0,
            )
            found = tables.find_row(own, old, metric.name, split=split)
            before_value = float("nan") if found is None else float(found["value"])
        yield TaskComparison(
            source.source.name, new, split, count, is_identical, metric.name, before_value, value
        )
