"""Evaluate final runs of a study on its reserve, without reading the results.

A study with ``keep`` does not keep weights, and its replicates may finish on several machines.
:func:`seal_reserve` therefore evaluates the models of a replicate as soon as it is complete. The
results stay unread beside the run until :func:`skillnet_studies.study.reserve.read_reserve` opens
them.
"""

from collections.abc import Sequence
from pathlib import Path

from pipelines.data.config.folds import is_reserve
from pipelines.training.evaluation.outcomes import OutcomeTable, write_outcomes
from skillnet_platform import console
from skillnet_studies.config.study import StudyConfig
from skillnet_studies.study.kept_results import RESERVE_ROWS, RESERVE_SUMS, sum_table


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
