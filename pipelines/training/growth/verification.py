"""Comparison of a grown model with its source: file bytes, metrics and outcomes of old tasks.

:func:`build_growth_report` is the main entry point; ``skillnet grow`` calls it after training, and
:func:`assert_frozen_unchanged` then fails the command if an old part changed.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.data.shards.dataset import PreparedCorpus
from pipelines.training.config.run import FinetuneConfig
from pipelines.training.evaluation import tables
from pipelines.training.evaluation.evaluator import uses_all_captions
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
    TaskState,
    TransferResult,
)
from pipelines.training.loading.task_columns import is_row_tower, tower_column
from pipelines.training.runs.layout import SOURCE, SOURCE_ROWS
from pipelines.training.runs.model_source import ModelSource
from skillnet import systems
from skillnet.model import SkillNet
from skillnet.multitask_model import TaskModel
from skillnet.objectives.base import find_objective
from skillnet.serialization import hash_file, read_manifest, read_tensor_shapes
from skillnet.skills import Task, find_task
from skillnet_platform.storage import read_json

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
    metric = tables.primary_metric(spec.objective)[0]
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
        metric = tables.primary_metric(settings.model.tasks[task].objective)[0]
        one, other = (tables.find_row(rows, task, metric) for rows in (before, after))
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
