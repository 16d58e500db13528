"""Other rates than those that a study tried: would its tuning have chosen one of them?

    python -m lab.rate_trials lab/results/final specialist --rates 4e-3 8e-3 \\
        --data runs/corpora --output lab/results/DATE-rate-trials.csv

The best rate of a task can be the largest that the study tried. This command repeats the study's
trials of one system with other rates: the same settings, steps, seeds, folds and validation rows.
No trial reads a test row, and no setting of the study changes. A rate of the study shows what the
repetition itself changes, for instance the precision of another machine.

``--pretraining`` repeats the trials of the rates of pretraining in the same way.

The command appends a row per rate, seed and task to the CSV, and does not repeat a trial that the
CSV has. Two processes with different ``--seeds`` can write to one CSV.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.measure import append_csv_rows, read_csv_rows, stamp
from pipelines.finetune import run_end_to_end
from pipelines.training.config.run import FinetuneConfig, TrainingConfig
from pipelines.training.loop.loop import train_model
from pipelines.training.loop.reporter import LoopReporter, evaluate_validation
from pipelines.training.loop.resolved_run import ResolvedRun, build_joint_run, resolve_run
from skillnet.multitask_model import TaskModel
from skillnet_platform import console
from skillnet_platform.errors import UserError
from skillnet_studies.study.kept_results import read_study_config
from skillnet_studies.study.study import read_study_ledger
from skillnet_studies.study.tuning import (
    RATE_KEYS,
    Stage,
    TuningResult,
    build_stage_trials,
    fit_best_rate,
    name_task_rate,
)
from sweeps.config.trials import ScoreConfig
from sweeps.trials.trial import Trial

COLUMNS = ("system", "task", "rate", "seed", "source", "score", "steps", "date", "machine")
#: Sources of a score: the study's own tuning, and this command.
STUDY, REPEATED = "study", "repeated"


class ScoreReporter(LoopReporter):
    """Scores of a run's tasks on its validation rows, at the last step.

    Args:
        config: settings of the run.
    """

    def __init__(self, config: FinetuneConfig) -> None:
        self._config = config
        #: Task -> score.
        self.scores: dict[str, float] = {}

    def needs_evaluation(self, step: int, last: int, settings: TrainingConfig) -> bool:
        return step == last

    def evaluate(self, model: TaskModel, step: int) -> None:
        rows = evaluate_validation(self._config, model, None)
        _, self.scores = ScoreConfig().compute_score(rows)


def build_rate_trials(
    study: Path,
    label: str,
    rates: Sequence[float],
    data: Path | None = None,
    stage: Stage = "rates",
) -> list[Trial]:
    """Return the trials that the study would have had with these rates.

    Args:
        study: directory of a study, or of its kept results.
        label: name of the system in tables.
        rates: learning rates.
        data: prepared corpora; None takes those of the run root.
        stage: whose rates; ``pretraining_rates`` for those of the pretraining.

    Raises:
        UserError: the study has no such system, or the system has a pretraining and the stage has
            not, or the reverse.
    """
    config = read_study_config(study)
    entry = config.systems.get(label)
    if entry is None:
        raise UserError(f"{study}: no system {label!r}; there are {', '.join(config.systems)}")
    if entry.pretrain != (stage == "pretraining_rates"):
        other = "name a system without one" if entry.pretrain else "leave --pretraining out"
        state = "starts from a pretraining" if entry.pretrain else "has no pretraining"
        raise UserError(f"{label} {state}; {other}")
    key = RATE_KEYS[stage]
    known, _ = read_study_ledger(study)
    # The rates of single tasks would win over the rate of the trial.
    settings = {
        name: value
        for name, value in known[label].settings.items()
        if name not in {*RATE_KEYS.values(), *map(name_task_rate, config.run.tasks)}
    }
    # A study tries three or more rates.
    grid: dict[str, Any] = {stage: sorted({*getattr(config.tuning, stage), *rates})}
    config = replace(
        config,
        systems={label: replace(entry, reuse_tuning_of=None)},
        tuning=replace(config.tuning, **grid),
        run=replace(config.run, data=str(data) if data else None),
    )
    trials = build_stage_trials(config, stage, {label: TuningResult(label, settings)})
    return [trial for trial in trials if trial.settings[key] in rates]


def list_study_scores(study: Path, label: str, stage: Stage = "rates") -> list[dict[str, Any]]:
    """Return the rows of the study's own rate trials.

    Args:
        study: directory of the study.
        label: name of the system in tables.
        stage: whose rates.
    """
    known, _ = read_study_ledger(study)
    key = RATE_KEYS[stage]
    return [
        {"task": task, "rate": trial["settings"][key], "seed": trial["seed"], "score": score}
        | {"system": label, "source": STUDY, "steps": trial["steps"]}
        for trial in known[label].trials
        if trial["stage"] == stage
        for task, score in trial["scores"].items()
    ]


def run_trial(trial: Trial) -> dict[str, float]:
    """Train a trial in this process without a folder; return task -> score.

    Its pretraining, if it has one, is a run of its own below the run root.
    """
    config = trial.config
    if trial.pretrain is not None:
        start = replace(trial.pretrain, name=f"pretraining-{trial.name}")
        model = run_end_to_end(build_joint_run(start), "pretrain")["model"]
        config = replace(config, init_from=model)
    resolved = resolve_run(config)
    reporter = ScoreReporter(resolved.config)
    train_model(ResolvedRun(resolved.config, None, resolved.corpora), reporter=reporter)
    return reporter.scores


def tabulate_scores(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Return the header and the rows of a table: mean score of each task by rate, in per cent.

    The last two rows are the rates that the study chooses from its own trials and from all.

    Args:
        rows: records of one system.
    """
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    if len(tasks) > 1:
        rows = [*rows, *_average_tasks(rows)]
        tasks.append("mean")
    groups: dict[tuple[float, str], dict[str, list[float]]] = {}
    for row in rows:
        group = groups.setdefault((float(row["rate"]), row["source"]), {})
        group.setdefault(row["task"], []).append(100 * float(row["score"]))
    table = [
        (f"{rate:g}", source, *(f"{fmean(scores[task]):.1f}" for task in tasks))
        for (rate, source), scores in sorted(
            groups.items(), key=lambda item: (item[0][1] != STUDY, item[0][0])
        )
    ]
    for source, used in (STUDY, [r for r in rows if r["source"] == STUDY]), ("all", rows):
        table.append(("chosen", source, *(_choose_rate(used, task) for task in tasks)))
    return ["rate", "trials", *tasks], table


def _average_tasks(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row per trial with its mean score over tasks."""
    trials: dict[tuple[float, str, int], list[float]] = {}
    for row in rows:
        key = (float(row["rate"]), row["source"], int(row["seed"]))
        trials.setdefault(key, []).append(float(row["score"]))
    return [
        {"task": "mean", "rate": rate, "source": source, "seed": seed, "score": fmean(scores)}
        for (rate, source, seed), scores in trials.items()
    ]


def _choose_rate(rows: Sequence[Mapping[str, Any]], task: str) -> str:
    own = [row for row in rows if row["task"] == task]
    fit = fit_best_rate([float(r["rate"]) for r in own], [float(r["score"]) for r in own])
    return f"{fit.rate:.1e}"


def main(argv: list[str] | None = None) -> int:
    """Train the trials that the CSV lacks, append their scores, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m lab.rate_trials")
    parser.add_argument("study", type=Path, help="directory of a study or of its kept results")
    parser.add_argument("system", help="label of a system")
    parser.add_argument("--pretraining", action="store_true", help="rates of the pretraining")
    parser.add_argument("--rates", type=float, nargs="+", required=True, help="learning rates")
    parser.add_argument("--seeds", type=int, nargs="+", help="tuning seeds (default: all)")
    parser.add_argument("--data", type=Path, help="prepared corpora (default: the run root's)")
    parser.add_argument("--output", type=Path, required=True, help="CSV of the scores")
    options = parser.parse_args(argv)
    label = options.system
    stage: Stage = "pretraining_rates" if options.pretraining else "rates"
    try:
        trials = build_rate_trials(options.study, label, options.rates, options.data, stage)
    except UserError as error:
        parser.error(str(error))
    done = {(r["system"], float(r["rate"]), int(r["seed"])) for r in read_csv_rows(options.output)}
    for trial in trials:
        rate, seed = trial.settings[RATE_KEYS[stage]], trial.config.seed
        if (label, rate, seed) in done or (options.seeds and seed not in options.seeds):
            continue
        scores = run_trial(trial)
        about = {
            "system": label,
            "rate": rate,
            "seed": seed,
            "source": REPEATED,
            "steps": trial.config.training.steps,
            **stamp(),
        }
        rows = [about | {"task": task, "score": round(s, 5)} for task, s in scores.items()]
        append_csv_rows(options.output, COLUMNS, rows)
        console.print_note(f"{label}, rate {rate:g}, seed {seed}: done")
    repeated = [row for row in read_csv_rows(options.output) if row["system"] == label]
    rows = [*list_study_scores(options.study, label, stage), *repeated]
    console.print_table(f"{label}: mean score on validation rows, %", *tabulate_scores(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
