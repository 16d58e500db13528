"""Scores of the simple references of a comparison: TF-IDF and nearest neighbours.

A reader compares every system with them. They are read from the rows of the runs if an evaluation
measured them, else from the prepared corpora of the runs. :func:`find_reference_scores` is called
by ``skillnet_studies.report.report``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from pipelines.training.evaluation.tables import SCORED_METRICS, score_metric
from skillnet_evidence.comparison import MEAN, SystemComparison
from skillnet_evidence.rows import REFERENCE_SYSTEM, build_reference_rows
from skillnet_evidence.tables import ReferenceScores
from skillnet_platform import console
from skillnet_platform.errors import UserError
from skillnet_platform.storage import read_record
from skillnet_studies.analysis.finished_runs import FinishedRun, list_finished, read_corpus_digests
from skillnet_studies.config.study import REFERENCES_FILE


def collect_reference_scores(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], float]:
    """Return the scores of the simple references among evaluation rows.

    Args:
        rows: records of any systems; other systems and secondary metrics are skipped.
    """
    return {
        (row["task"], row["split"]): score_metric(row["metric"], float(row["value"]))
        for row in rows
        if row["system"] == REFERENCE_SYSTEM and row["metric"] in SCORED_METRICS
    }


def describe_references(comparison: SystemComparison) -> str:
    """Return the sentence about the simple references in the caption of a table."""
    # They are measured on the corpora, which know nothing of the fractions of single runs.
    has_few_labels = any(
        task.get("label_fraction", 1.0) < 1
        for run in _list_runs(comparison)
        for task in (run.settings.get("tasks") or {}).values()
        if task
    )
    rows = "all labelled training rows" if has_few_labels else "the same rows"
    return (
        " Simple references: TF-IDF with logistic regression, nearest neighbours; trained on "
        f"{rows}, without intervals or tests."
    )


def find_reference_scores(comparison: SystemComparison) -> dict[tuple[str, str], float]:
    """Return the scores of the simple references of a comparison; {} if they are unknown.

    The rows of the runs come first. Else the references are measured on the corpora, if they are
    prepared on this machine in the version of the runs, with a cache beside them. Each fold of a
    study is measured, and a score is the mean over folds. Last comes the file of a kept study.

    Args:
        comparison: computed results.
    """
    found = collect_reference_scores([row for run in _list_runs(comparison) for row in run.rows])
    found = found or measure_references(comparison) or _read_references(comparison)
    # References are measured by the primary metrics alone.
    chosen = {name for name, each in comparison.metrics.items() if each.name not in SCORED_METRICS}
    return {key: score for key, score in found.items() if key[0] not in chosen}


def build_references(references: ReferenceScores, comparison: SystemComparison) -> dict[str, Any]:
    """Return the document of a study's simple references, which its later reports read.

    Args:
        references: scores by task and split.
        comparison: names the corpora and their versions.
    """
    rows = build_reference_rows(references, comparison.common_tasks)
    return {**_identify_rows(comparison), "scores": rows}


def _read_references(comparison: SystemComparison) -> dict[tuple[str, str], float]:
    """Return the scores of the study of the runs, if they are of the same corpora."""
    for folder in dict.fromkeys(run.folder.parent.parent for run in _list_runs(comparison)):
        path = folder / REFERENCES_FILE
        if not path.is_file():
            continue
        schema: dict[str, type | tuple[type, ...]] = {"corpora": dict, "fold": dict, "scores": list}
        content = read_record(path, schema, "remove it, or compare with the corpora at hand")
        if all(content[key] == own for key, own in _identify_rows(comparison).items()):
            return {
                (row["task"], row["split"]): float(row["score"])
                for row in content["scores"]
                if row["task"] != MEAN
            }
    return {}


def _identify_rows(comparison: SystemComparison) -> dict[str, Any]:
    """Return what determines the test rows; a report on the reserve has no fold."""
    digests = {
        name: digest for run in _list_runs(comparison) for name, digest in run.digests.items()
    }
    return {"corpora": digests, "fold": asdict(replace(_list_runs(comparison)[0].fold, number=0))}


def measure_references(comparison: SystemComparison) -> dict[tuple[str, str], float]:
    """Return the mean scores over the folds of the runs; {} unless the corpora are here.

    Args:
        comparison: computed results; the settings of its runs name the prepared corpora.
    """
    # Of each fold the run with the most tasks, because systems may lack some.
    ordered = sorted(_list_runs(comparison), key=lambda run: len(run.outcomes))
    folds = {run.fold.number: run for run in ordered if _has_corpora(run)}
    if {run.fold.number for run in _list_runs(comparison)} != set(folds):
        return {}
    try:
        parts = [
            collect_reference_scores(_measure_run(run, comparison.tasks)) for run in folds.values()
        ]
    except (UserError, ValueError, KeyError) as error:
        # Corpora without raw texts, or with rows that a classifier cannot fit, must not cost the
        # report of finished runs.
        console.print_warning(f"the report has no simple references: {error}")
        return {}
    common = [key for key in parts[0] if all(key in part for part in parts)]
    return {key: fmean(part[key] for part in parts) for key in common}


def _list_runs(comparison: SystemComparison) -> list[FinishedRun]:
    return [run for runs in list_finished(comparison).values() for run in runs]


def _has_corpora(run: FinishedRun) -> bool:
    """Return whether the corpora of a run are prepared here, in its version."""
    return bool(run.digests) and read_corpus_digests(run.settings) == dict(run.digests)


def _measure_run(run: FinishedRun, tasks: Sequence[str]) -> list[dict[str, Any]]:
    from pipelines.training.config.run import FinetuneConfig
    from pipelines.training.evaluation.simple_baselines import evaluate_simple_baselines
    from skillnet_platform import config as configuration

    config = configuration.build_config(FinetuneConfig, dict(run.settings))
    corpora = {name: task.corpus for name, task in config.tasks.items() if task is not None}
    specs = {name: config.model.tasks[name] for name in tasks if name in corpora}
    with console.show_progress("simple references", len(specs), "tasks") as bar:
        return evaluate_simple_baselines(
            Path(str(config.data)),
            specs,
            corpora=corpora,
            # The report shows no intervals of references, so none are computed.
            bootstrap_samples=0,
            on_task=lambda name: bar.advance(1, name),
            fold=run.fold,
        )
