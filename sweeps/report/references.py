"""Scores of the simple references of a comparison: TF-IDF and nearest neighbours.

A reader compares every system with them. They are read from the rows of the runs if an evaluation
measured them, else from the prepared corpora of the runs. :func:`find_reference_scores` is called
by ``sweeps.report.report``.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from pipelines.evaluation.tables import SCORED_METRICS, score_metric
from skillnet_platform import console
from skillnet_platform.errors import UserError
from sweeps.analysis.comparison import MEAN, SPLIT, SystemComparison
from sweeps.analysis.finished_runs import FinishedRun, read_corpus_digests

#: Name of the system in evaluation rows, and its label in the report.
REFERENCE_SYSTEM, REFERENCE_LABEL = "simple_baseline", "simple references"

REFERENCE_NOTE = (
    " Simple references: TF-IDF with logistic regression, nearest neighbours; trained on the same "
    "rows, without intervals or tests."
)

#: (task, split) -> score as a fraction, where higher is better.
ReferenceScores = Mapping[tuple[str, str], float]


def collect_reference_scores(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], float]:
    """Return the scores of the simple references among evaluation rows.

    Args:
        rows: of any systems; other systems and secondary metrics are skipped.
    """
    return {
        (row["task"], row["split"]): score_metric(row["metric"], float(row["value"]))
        for row in rows
        if row["system"] == REFERENCE_SYSTEM and row["metric"] in SCORED_METRICS
    }


def average_references(references: ReferenceScores, tasks: Sequence[str]) -> float | None:
    """Return the mean score over tasks on the split test; None if a task has no reference.

    Args:
        references: scores by task and split.
        tasks: tasks that all systems have.
    """
    scores = [references.get((task, SPLIT)) for task in tasks]
    known = [score for score in scores if score is not None]
    return fmean(known) if scores and len(known) == len(scores) else None


def build_reference_rows(references: ReferenceScores, tasks: Sequence[str]) -> list[dict[str, Any]]:
    """Return rows of ``summary.csv`` for the simple references, and for their mean.

    Args:
        references: scores by task and split.
        tasks: tasks that all systems have.
    """
    mean = average_references(references, tasks)
    scores = dict(references) | ({(MEAN, SPLIT): mean} if mean is not None else {})
    return [
        {"system": REFERENCE_SYSTEM, "task": task, "split": split, "metric": "score"}
        | {"value": score, "score": score}
        for (task, split), score in scores.items()
    ]


def find_reference_scores(comparison: SystemComparison) -> dict[tuple[str, str], float]:
    """Return the scores of the simple references of a comparison; {} if they are unknown.

    The rows of the runs come first. Else the references are measured on the corpora, if they are
    prepared on this machine in the version of the runs. The results are cached beside them.

    Args:
        comparison: computed results.
    """
    rows = [row for run in comparison.runs for row in run.rows]
    found = collect_reference_scores(rows)
    if found:
        return found
    for run in comparison.runs:
        if _has_corpora(run):
            try:
                return collect_reference_scores(_measure_references(run, comparison.tasks))
            except UserError as error:
                console.print_warning(f"the report has no simple references: {error}")
                return {}
    return {}


def _has_corpora(run: FinishedRun) -> bool:
    """Return whether the corpora of a run are prepared here, in its version and without folds."""
    # Each fold has test rows and references of its own, which only its runs can state.
    if (run.settings.get("fold") or {}).get("count"):
        return False
    return bool(run.digests) and read_corpus_digests(run.settings) == dict(run.digests)


def _measure_references(run: FinishedRun, tasks: Sequence[str]) -> list[dict[str, Any]]:
    from pipelines.config.run import FinetuneConfig
    from pipelines.evaluation.simple_baselines import evaluate_simple_baselines
    from skillnet_platform import config as configuration

    config = configuration.build_config(FinetuneConfig, dict(run.settings))
    corpora = {name: task.corpus for name, task in config.tasks.items() if task is not None}
    specs = {name: config.model.tasks[name] for name in tasks}
    with console.show_progress("simple references", len(specs), "tasks") as bar:
        return evaluate_simple_baselines(
            Path(str(config.data)),
            specs,
            corpora=corpora,
            # The report shows no intervals of references, so none are computed.
            bootstrap_samples=0,
            on_task=lambda name: bar.advance(1, name),
        )
