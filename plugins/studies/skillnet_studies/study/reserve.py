"""The reserve of a study: units that no run reads, evaluated once with all final models.

A study with ``keep`` does not keep weights, and its replicates may finish on several machines.
:func:`seal_reserve` therefore evaluates the models of a replicate as soon as it is complete, and
shows no result.

:func:`read_reserve` is called by ``skillnet compare --read_reserve once``. It records each read in
``reserve.json`` before it evaluates, so that a second look cannot go unnoticed. All replicates
answer the same rows of the reserve; :func:`collect_reserve_runs` makes runs of them that differ in
the seed only, and the comparison treats replicates and held-out units as crossed.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.data.config.folds import RESERVE_SPLIT, is_reserve
from pipelines.training.evaluation.outcomes import OutcomeTable, read_outcomes, write_outcomes
from skillnet_evidence.comparison import SystemComparison
from skillnet_evidence.scores import SPLIT
from skillnet_platform import config as configuration
from skillnet_platform import console
from skillnet_platform.errors import UserError
from skillnet_platform.storage import read_record, write_json
from skillnet_platform.tracking.source_commit import find_source_commit
from skillnet_studies.analysis.finished_runs import FinishedRun, read_evaluation_rows, read_run
from skillnet_studies.config.study import StudyConfig
from skillnet_studies.study.kept_results import (
    RESERVE_RECORD,
    RESERVE_ROWS,
    RESERVE_SUMS,
    KeptStudy,
    find_kept_path,
    sum_table,
    write_document,
)


def seal_reserve(config: StudyConfig, folders: Sequence[Path]) -> None:
    """Evaluate the models of final runs on the reserve, and show no result.

    Args:
        config: the study; without a reserve, or with ``seal_reserve: false``, nothing is done.
        folders: directories of finished final runs; one that is evaluated, or has no model here,
            stays as it is.
    """
    if has_reserve(config) and config.seal_reserve:
        evaluate_runs([folder for folder in folders if has_model(folder)])


def evaluate_runs(folders: Sequence[Path]) -> None:
    """Evaluate the models of final runs on the reserve; an evaluated run stays as it is.

    Args:
        folders: run directories with a model.
    """
    for folder in folders:
        if not is_evaluated(folder):
            _evaluate_run(folder)


def _evaluate_run(folder: Path) -> None:
    from pipelines.training.evaluation.evaluator import evaluate_model, open_task_corpus
    from pipelines.training.evaluation.tables import write_evaluation_csv
    from pipelines.training.runs import model_source

    source = model_source.resolve_model(str(folder))
    data = str(source.settings["data"])
    model, outcomes = model_source.load_trained_tasks(source), OutcomeTable()
    console.print_note(f"{folder.name}: evaluating on the reserve")
    splits = {
        split
        for task in model.config.tasks
        for split in open_task_corpus(data, task, source.corpora, source.fold, True).splits
        if is_reserve(split)
    }
    rows = evaluate_model(
        model,
        data,
        splits=sorted(splits),
        seed=source.seed,
        corpora=source.corpora,
        limits=source.limits,
        metrics=source.metrics,
        steps=source.steps,
        bootstrap_samples=0,
        outcomes=outcomes,
        fold=source.fold,
        with_reserve=True,
    )
    write_evaluation_csv(rows, folder / RESERVE_ROWS)
    write_outcomes(sum_table(outcomes), folder / RESERVE_SUMS)


def has_reserve(config: StudyConfig) -> bool:
    """Return whether the folds of a study reserve units."""
    fold = config.run.fold
    return bool(fold.reserve_part or fold.reserve_units)


def is_evaluated(folder: Path) -> bool:
    """Return whether a run has its result on the reserve."""
    # Written last, so a file is a complete result.
    return (folder / RESERVE_SUMS).is_file()


def has_model(folder: Path) -> bool:
    """Return whether a run has its weights on this machine."""
    return (folder / "model" / "manifest.json").is_file()


def read_reserve(config: StudyConfig, runs: Sequence[tuple[str, Path]]) -> list[FinishedRun]:
    """Evaluate the models of all final runs on the reserve; return the runs with these results.

    Args:
        config: the study.
        runs: label and directory of each finished final run.

    Raises:
        UserError: the study has no reserve, was read before, or a run has neither a model nor a
            sealed result.
    """
    if not has_reserve(config):
        raise UserError(
            "read_reserve: the study has no reserve. Set run.fold.reserve_part or "
            "run.fold.reserve_units before it starts"
        )
    path = config.folder / RESERVE_RECORD
    reads = read_reserve_record(config)
    is_open = bool(reads) and reads[-1]["finished"] is None
    if reads and config.read_reserve == "once" and not is_open:
        raise UserError(
            f"{path}: the reserve was read on {reads[-1]['started']} at commit "
            f"{reads[-1]['commit']}, and its rows are no longer unseen. Use that result, or give "
            "--read_reserve again, which is recorded"
        )
    folders = [folder for _, folder in runs]
    absent = [str(f) for f in folders if not has_model(f) and not is_evaluated(f)]
    if absent or not runs:
        raise UserError(
            f"read_reserve: {len(absent)} of {len(runs)} final runs have no model"
            f"{f', such as {absent[0]}' if absent else ''}. The reserve is read once, with all of "
            "them: train the missing runs again"
        )
    if not is_open:
        reads.append(
            {
                "started": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
                "finished": None,
                "commit": find_source_commit(),
                "is_repeated": bool(reads),
                "claims": configuration.digest_config(config.claims)[:12],
                "runs": sorted(folder.name for folder in folders),
            }
        )
        # A sealed result is the answer of the same model; only "again" asks the model once more.
        for folder in folders:
            if config.read_reserve == "again" and has_model(folder):
                (folder / RESERVE_SUMS).unlink(missing_ok=True)
    # Before the first row is read: a killed evaluation has read, too.
    _write_record(config, reads)
    evaluate_runs(folders)
    reads[-1]["finished"] = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    _write_record(config, reads)
    return collect_reserve_runs(runs)


def read_reserve_record(config: StudyConfig) -> list[dict[str, Any]]:
    """Return the reads of a study's reserve, oldest first, also those on another machine.

    Args:
        config: the study.
    """
    path, found = config.folder / RESERVE_RECORD, []
    remedy = "restore it from a backup: it says whether the reserve was read"
    if path.is_file():
        found.append(list(read_record(path, {"reads": list}, remedy)["reads"]))
    if config.keep:
        kept = KeptStudy(find_kept_path(config))
        try:
            found.append(list(kept.content.get(RESERVE_RECORD, {"reads": []})["reads"]))
        except (KeyError, TypeError):
            raise UserError(f"{kept.record}: {RESERVE_RECORD}: no reads; {remedy}") from None
    return max(found, key=len, default=[])


def collect_reserve_runs(runs: Sequence[tuple[str, Path]]) -> list[FinishedRun]:
    """Return final runs with their answers on the reserve in place of those on the test split.

    Args:
        runs: label and directory of each final run.
    """
    found = []
    for label, folder in runs:
        run, sums = read_run(folder, label), read_outcomes(folder / RESERVE_SUMS)
        outcomes = OutcomeTable()
        for task, split in sums:
            part = sums[task, split]
            name = _rename_split(split)
            outcomes.add(task, name, part.numerator, part.denominator, part.rank, part.unit)
        rows = [
            {**row, "split": _rename_split(row["split"])}
            for row in read_evaluation_rows(folder / RESERVE_ROWS)
        ]
        # All replicates answer the same rows, so only their seeds distinguish them.
        # Without the location of the corpora no reference is measured on their test split.
        settings = {k: v for k, v in run.settings.items() if k not in ("fold", "data")}
        found.append(replace(run, settings=settings, rows=rows, outcomes=outcomes))
    return found


def drop_tests(comparison: SystemComparison) -> SystemComparison:
    """Return the comparison on a reserve without tests of its scores.

    One voice, artist or package can have most rows of a reserve. Two or three degrees of freedom
    are too few for a test.

    Args:
        comparison: scores and tests of the runs of :func:`collect_reserve_runs`.
    """
    return replace(comparison, tests=[])


def _rename_split(split: str) -> str:
    """Return the split that a comparison tests for the reserve; its parts keep their names."""
    return SPLIT if split == RESERVE_SPLIT else split


def _write_record(config: StudyConfig, reads: Sequence[Mapping[str, Any]]) -> None:
    record = {"reads": list(reads)}
    write_json(config.folder / RESERVE_RECORD, record)
    if config.keep:
        write_document(find_kept_path(config), RESERVE_RECORD, record)
