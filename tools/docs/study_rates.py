"""Learning rates that the present rule chooses from the tuning trials of a kept study.

``python -m tools.docs.study_rates STUDY`` prints them beside the rates of the study. The preset
``studies/rates`` has these rates, so it trains no tuning trial.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from skillnet_evidence.cells import ReportTable, TableCell
from skillnet_evidence.claims import estimate_difference
from skillnet_evidence.comparison import MEAN
from skillnet_evidence.format import format_interval, format_setting
from skillnet_platform.errors import UserError
from skillnet_platform.tables import show_table
from skillnet_studies.analysis.finished_runs import FinishedRun, compare_runs, label_runs
from skillnet_studies.study.kept_results import open_study, read_study_config
from skillnet_studies.study.study import read_study_ledger, read_study_runs
from skillnet_studies.study.tuning import (
    RATE,
    RATE_KEYS,
    Stage,
    TuningResult,
    choose_rates,
    name_task_rate,
)


def choose_rates_again(folder: Path) -> dict[str, TuningResult]:
    """Return label -> tuning of a system, with the rates that the present rule chooses.

    Args:
        folder: directory of a study or of its kept results.
    """
    systems = read_study_config(folder).systems
    tuning, _ = read_study_ledger(folder)
    chosen = {}
    for label, own in tuning.items():
        result = replace(own, rates={})
        for stage, key in RATE_KEYS.items():
            if rows := _select_trials(own, stage):
                result = choose_rates(result, rows, key, systems[label].rate_per_task)
        chosen[label] = result
    return chosen


def build_rates_table(folder: Path) -> ReportTable:
    """Return the rates of a study, those of the present rule, and the score at each tried rate.

    Args:
        folder: directory of a study or of its kept results.
    """
    before, _ = read_study_ledger(folder)
    lines = [
        (label, name, before[label].settings[key], own.settings[key], scores)
        for label, own in choose_rates_again(folder).items()
        for name, key, scores in _list_scores(own)
    ]
    tried = sorted({rate for *_, scores in lines for rate in scores})
    rows = [
        [label, name, f"{first:.2e}", f"{again:.2e}"]
        + [f"{100 * fmean(scores[rate]):.1f}" if rate in scores else "" for rate in tried]
        for label, name, first, again, scores in lines
    ]
    return ReportTable(
        "Rates of the study and of the present rule",
        ["system", "score", "study", "present rule", *map(format_setting, tried)],
        [[TableCell(word) for word in row] for row in rows],
        "Below each tried rate: mean score of its trials on validation rows, in percent.",
    )


def build_change_table(first: Path, again: Path) -> ReportTable:
    """Return the differences from the reference in two studies, on the replicates that both have.

    Args:
        first: kept study.
        again: kept study of the same systems at other rates.
    """
    studies = [read_kept_runs(folder) for folder in (first, again)]
    shared = set.intersection(*({run.replicate for run in runs} for runs in studies))
    reference = read_study_config(first).reference
    compared = [
        compare_runs([run for run in runs if run.replicate in shared], reference)
        for runs in studies
    ]
    tests = [test for test in compared[1].tests if test.task == MEAN and test.kind != "pretraining"]
    rows = []
    for test in tests:
        pair = (test.system, test.against)
        changes = [estimate_difference(each, *pair, MEAN) for each in compared]
        rows.append([" − ".join(pair), *map(format_interval, changes)])
    return ReportTable(
        "Differences of the mean score at the rates of both studies",
        ["systems", *(f"studies/{folder.name}" for folder in (first, again))],
        [[TableCell(word) for word in row] for row in rows],
        f"In points, with 95 % intervals, on {len(shared)} replicates that both studies have.",
    )


#: Final runs of an unpacked study. Several tables show them, and no file of the copy changes.
read_once = cache(read_study_runs)


def read_kept_runs(folder: Path) -> list[FinishedRun]:
    """Return the labelled final runs of a kept study."""
    return label_runs(read_once(open_study(folder)))


def _select_trials(own: TuningResult, stage: Stage) -> list[dict[str, Any]]:
    return [row for row in own.trials if row["stage"] == stage and row["score"] is not None]


def _list_scores(own: TuningResult) -> Iterator[tuple[str, str, Mapping[float, Sequence[float]]]]:
    """Yield the name of a score, the key of the rate that it chooses, and rate -> scores."""
    for stage, key in RATE_KEYS.items():
        trials = _select_trials(own, stage)
        if not trials:
            continue
        tasks = [t for t in trials[0]["scores"] if key == RATE and name_task_rate(t) in own.rates]
        for task in tasks:
            pairs = [(row["settings"][key], row["scores"][task]) for row in trials]
            yield task.replace("_", " "), name_task_rate(task), _group_scores(pairs)
        if not tasks:
            pairs = [(row["settings"][key], row["score"]) for row in trials]
            yield "mean" if key == RATE else "pretraining, mean", key, _group_scores(pairs)


def _group_scores(pairs: Sequence[tuple[float, float]]) -> dict[float, list[float]]:
    """Return rate -> scores of its trials."""
    scores: dict[float, list[float]] = {}
    for rate, score in pairs:
        scores.setdefault(rate, []).append(score)
    return scores


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m tools.docs.study_rates", description=__doc__)
    parser.add_argument("study", type=Path, help="directory of a study or of its kept results")
    options = parser.parse_args(argv)
    try:
        table = build_rates_table(options.study)
    except UserError as error:
        parser.error(str(error))
    show_table(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
