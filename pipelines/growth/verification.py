"""Measuring what growing left untouched: bytes of files, figures and rows of old tasks."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.config.run import FinetuneConfig
from pipelines.evaluation import tables
from pipelines.evaluation.outcomes import OUTCOMES_FILE as OUTCOMES
from pipelines.evaluation.outcomes import (
    OutcomeTable,
    paired_difference,
    read_outcomes,
    write_outcomes,
)
from pipelines.growth.report import GROWN, FileState, GrowthReport, TaskState, TransferResult
from pipelines.runs.model_source import ModelSource
from skillnet import systems
from skillnet.model import SkillNet
from skillnet.serialization import hash_file, read_manifest
from skillnet.skills import Task
from skillnet_platform import console

#: What must not change of a row; the rest says when and where it was measured.
COMPARED_COLUMNS = ("value", "low", "high", "activated_params", "flops_per_example")


def added_files(before: SkillNet, grown: SkillNet) -> list[str]:
    """Files that growing added: the new skill's, the new head's, perhaps a stem's."""
    return sorted(grown.files_of().keys() - before.files_of().keys())


def compare_files(source: ModelSource, before: SkillNet, folder: Path) -> list[FileState]:
    """The weight files of the source and of a saved model, by the hash of their bytes.

    What a file was before is read from the source's manifest, which was checked when it was
    loaded; of a checkpoint that keeps averaged weights, which are not among its files, it is the
    hash of what they are written as.
    """
    listed = read_manifest(source.weights)["files"]
    if any(name.startswith("average-") for name in listed):
        old = {file: _hash(before, names) for file, names in before.files_of().items()}
    else:
        old = {file: listed[f"{file}.safetensors"]["sha256"] for file in before.files_of()}
    new = {path.stem: hash_file(path) for path in sorted(folder.glob("*.safetensors"))}
    return [
        FileState(file, old.get(file), new.get(file))
        for file in [*old, *sorted(new.keys() - old.keys())]
    ]


def assert_files_unchanged(files: Sequence[FileState]) -> None:
    """Raise RuntimeError if an old file is not what it was: a defect of this program, or weights
    that another version of safetensors lays out in another way."""
    for file in files:
        if file.state not in ("same", "new"):
            raise RuntimeError(f"{file.file} is {file.state}: sha256 {file.before}, {file.after}")


def assert_frozen_unchanged(report: GrowthReport) -> None:
    """Raise RuntimeError, naming the first of it, if anything but the new files changed."""
    assert_files_unchanged(report.files)
    for each in report.tasks:
        if not each.same:
            raise RuntimeError(
                f"{each.task} {each.split} {each.metric} was {each.before} and is {each.after}"
            )
    if not report.untouched:
        raise RuntimeError(
            f"{report.rows_differing} rows of old tasks came out otherwise; the optimiser kept "
            f"state for {', '.join(report.optimiser)}"
        )


def build_growth_report(
    source: ModelSource,
    before: SkillNet,
    settings: FinetuneConfig,
    run: Path,
    result: Mapping[str, Any],
    others: Mapping[str, Mapping[str, Any]],
    added: tuple[str, str],
) -> GrowthReport:
    """Measure the source now and compare; see :class:`Growth`.

    Args:
        source, before: the model that grew, and it in memory.
        settings: of the run.
        run: its folder, with the final model and ``outcomes.parquet``.
        result: what the run came to.
        others: reference -> what its run came to.
        added: the new skill and the new task.
    """
    skill, task = added
    spec = settings.model.tasks[task]
    old_rows, old_outcomes = _measured_before(before, settings, run)
    own_outcomes = read_outcomes(run / OUTCOMES)
    compared = differing = 0
    for key in old_outcomes:
        one, other = old_outcomes[key], own_outcomes[key]
        alike = (one.numerator == other.numerator) & (one.denominator == other.denominator)
        compared, differing = compared + len(one), differing + int((~alike).sum())
    checkpoint = max((run / "checkpoints").glob("step-*"))
    runs = {GROWN: result, **others}
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
        total_parameters=sum(p.numel() for p in model.parameters()),
        files=compare_files(source, before, run / "model"),
        tasks=_compare_rows(old_rows, result["evaluation"]),
        rows_compared=compared,
        rows_differing=differing,
        optimiser=sorted(
            path.stem.removeprefix("optimizer-")
            for path in checkpoint.glob("optimizer-*.safetensors")
        ),
        worth=[
            each
            for name, done in runs.items()
            for each in _worth(name, done, own_outcomes, old_rows, task, spec, settings)
        ],
    )


def _measured_before(
    before: SkillNet, settings: FinetuneConfig, run: Path
) -> tuple[list[dict[str, Any]], OutcomeTable]:
    """Rows and outcomes of the old tasks on the source, in this process as the grown model's."""
    from pipelines.evaluation.evaluator import evaluate_model

    old = {
        name: settings.tasks[name]
        for name in tables.sort_rows(settings.tasks)
        if settings.tasks[name].eval_only
    }
    outcomes = OutcomeTable()
    if not old:
        return [], outcomes
    with console.progress("the source, for comparison", None, "rows") as bar:
        rows = evaluate_model(
            before,
            str(settings.data),
            list(old),
            seed=settings.seed,
            corpora={name: task.corpus for name, task in old.items()},
            limits={name: task.max_length for name, task in old.items()},
            on_split=lambda task, split, count: bar.advance(count, f"{task} {split}"),
            outcomes=outcomes,
        )
    # Through the file, as the grown model's: it keeps fewer digits than memory.
    write_outcomes(outcomes, run / f"before-{OUTCOMES}")
    return rows, read_outcomes(run / f"before-{OUTCOMES}")


def _compare_rows(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]
) -> list[TaskState]:
    found = {(row["task"], row["split"], row["metric"]): row for row in after}
    states = []
    for row in before:
        other = found.get((row["task"], row["split"], row["metric"]), {})
        same = all(_equal(row[key], other.get(key)) for key in COMPARED_COLUMNS)
        states.append(
            TaskState(
                row["task"],
                row["split"],
                row["metric"],
                row["value"],
                other.get("value", float("nan")),
                same,
            )
        )
    return states


def _worth(
    name: str,
    done: Mapping[str, Any],
    own: OutcomeTable,
    old_rows: Sequence[dict[str, Any]],
    task: str,
    spec: Task,
    settings: FinetuneConfig,
) -> list[TransferResult]:
    metric = tables.OBJECTIVE_METRICS[spec.objective][0]
    theirs = read_outcomes(Path(done["run"]) / OUTCOMES)
    rows = [r for r in done["evaluation"] if (r["task"], r["metric"]) == (task, metric)]
    found = []
    for row in rows:
        key = (task, row["split"])
        behind = [] if name == GROWN else list(paired_difference(own[key], theirs[key]))
        found.append(
            TransferResult(
                system=name,
                split=row["split"],
                metric=metric,
                value=row["value"],
                low=row["low"],
                high=row["high"],
                behind=behind,
                trained=_trained(Path(done["run"])),
                seconds=float(done["seconds"]),
                lost={} if name == GROWN else _headlines(old_rows, done["evaluation"], settings),
            )
        )
    return found


def _trained(run: Path) -> int:
    """Parameters that a run's steps changed: those that its optimiser kept an average for."""
    from safetensors import safe_open

    checkpoint = max((run / "checkpoints").glob("step-*"))
    total = 0
    for path in checkpoint.glob("optimizer-*.safetensors"):
        with safe_open(str(path), "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - it is no mapping
                if key.endswith("/exp_avg"):
                    size = 1
                    for length in tensors.get_slice(key).get_shape():
                        size *= length
                    total += size
    return total


def _headlines(
    before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]], settings: FinetuneConfig
) -> dict[str, list[float]]:
    found = {}
    for task in settings.tasks:
        metric = tables.OBJECTIVE_METRICS[settings.model.tasks[task].objective][0]
        one, other = (tables.find_row(rows, task, metric) for rows in (before, after))
        if one is not None and other is not None:
            found[task] = [float(one["value"]), float(other["value"])]
    return found


def _hash(model: SkillNet, names: Sequence[str]) -> str:
    from safetensors.torch import save

    tensors = {name: model.get_parameter(name).detach().cpu().contiguous() for name in names}
    return hashlib.sha256(save(tensors)).hexdigest()


def _equal(one: Any, other: Any) -> bool:
    return bool(one == other) or (one != one and other != other)  # two NaNs are the same
