"""Changes of the method on one task of the study or the demo, with the same seeds, on validation
rows.

    python -m lab.method_trials speech_recognition --steps 600 --every 25 --below 0.5 \\
        --arm "constant rate" training.schedule=constant \\
        --average 0.9 0.99 --data runs/corpora --output lab/results/DATE-method-speech.csv

The arm ``configured`` is the run of the headline study, or with ``--preset quickstart`` that of the
demo; each other arm sets some keys of it. All arms train the task alone, with the auxiliary tasks
that an arm adds. ``--average`` evaluates averages of the weights beside the last weights, as
``training.ema`` computes them: they do not change the training. The command appends rows to the
CSV, and does not repeat a trial that the CSV has.
"""

import argparse
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from benchmarks.measure import append_csv_rows, read_csv_rows, stamp
from pipelines.training.config.run import FinetuneConfig, TrainingConfig
from pipelines.training.loop.loop import train_model
from pipelines.training.loop.optimizer import WeightAverage
from pipelines.training.loop.reporter import LoopReporter, evaluate_validation
from pipelines.training.loop.resolved_run import ResolvedRun, resolve_run
from skillnet.multitask_model import TaskModel
from skillnet.objectives.base import find_objective
from skillnet_platform import config as configuration
from skillnet_platform import console
from skillnet_studies.config.study import StudyConfig
from skillnet_studies.study.system_runs import override_run

COLUMNS = (
    "task", "arm", "settings", "seed", "step", "average", "metric", "value", "steps", "date",
    "machine",
)  # fmt: skip
#: Arm without changes, with which the others are compared.
CONFIGURED = "configured"
#: The preset of the study.
STUDY = "studies/headline"


class TrialReporter(LoopReporter):
    """Evaluation of a run on its validation rows, with averages of its weights at the end.

    Args:
        config: settings of the run.
        every: steps between two evaluations.
        averages: decays of the averages.
    """

    def __init__(self, config: FinetuneConfig, every: int, averages: Sequence[float]) -> None:
        self._config, self._every = config, every
        self._averages = {decay: WeightAverage(decay) for decay in averages}
        #: Step, decay (0 for the weights themselves), metric and value.
        self.values: list[tuple[int, float, str, float]] = []

    def needs_evaluation(self, step: int, last: int, settings: TrainingConfig) -> bool:
        # Each step moves the averages.
        return bool(self._averages) or step == last or not step % self._every

    def evaluate(self, model: TaskModel, step: int) -> None:
        for average in self._averages.values():
            average.update(list(model.named_parameters()))
        is_last = step == self._config.training.steps
        if is_last or not step % self._every:
            self._add(model, step, 0.0)
        for decay, average in self._averages.items() if is_last else ():
            average.swap(model)
            self._add(model, step, decay)
            average.swap(model)

    def _add(self, model: TaskModel, step: int, decay: float) -> None:
        (task,) = self._config.measured
        metric = find_objective(self._config.model.tasks[task].objective).primary.name
        rows = evaluate_validation(self._config, model, None)
        value = next(row["value"] for row in rows if row["metric"] == metric)
        self.values.append((step, decay, metric, round(float(value), 5)))


def build_trial(task: str, steps: int, data: Path | None, preset: str = STUDY) -> FinetuneConfig:
    """Return the run of a preset with one task.

    Args:
        task: its name.
        steps: number of optimizer steps of the run.
        data: prepared corpora; None takes those of the run root.
        preset: a study, whose run is taken, or a run.
    """
    arguments = ["--config", preset]
    if preset == STUDY:
        run = configuration.parse_config(StudyConfig, arguments, "skillnet compare").run
    else:
        run = configuration.parse_config(FinetuneConfig, arguments, "skillnet finetune")
    training = replace(run.training, steps=steps)
    tasks = {task: run.tasks[task]}
    return replace(run, data=str(data) if data else None, tasks=tasks, training=training)


def run_trial(config: FinetuneConfig, every: int, averages: Sequence[float]) -> TrialReporter:
    """Train a run in this process without a folder; return its evaluations."""
    resolved = resolve_run(config)
    reporter = TrialReporter(resolved.config, every, averages)
    train_model(ResolvedRun(resolved.config, None, resolved.corpora), reporter=reporter)
    return reporter


def find_first_step(rows: Iterable[Mapping[str, Any]], below: float) -> float:
    """Return the first step whose value is at most ``below``; infinity if none is.

    Args:
        rows: evaluations of one trial.
        below: bound of a metric that falls.
    """
    reached = [int(row["step"]) for row in rows if float(row["value"]) <= below]
    return min(reached, default=float("inf"))


def summarize_trials(
    rows: Sequence[Mapping[str, Any]], below: float | None = None
) -> list[tuple[str, ...]]:
    """Return a row per arm and average: final values, and differences to the configured run.

    Args:
        rows: records of the CSV, of one task.
        below: also state the first step of each seed with a value of at most this.
    """
    final: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if row["step"] == row["steps"]:
            own = final.setdefault((row["arm"], row["average"]), {})
            own[row["seed"]] = float(row["value"])
    base = final[CONFIGURED, "0.0"]
    table = []
    for (arm, average), values in final.items():
        differences = [value - base[seed] for seed, value in values.items() if seed in base]
        cells = [
            arm,
            average,
            ", ".join(f"{value:.3f}" for value in values.values()),
            f"{statistics.mean(values.values()):.3f}",
            f"{statistics.stdev(values.values()):.3f}" if len(values) > 1 else "–",
            "–" if values is base else _describe_differences(differences),
        ]
        if below is not None:
            trials = [row for row in rows if (row["arm"], row["average"]) == (arm, average)]
            steps = [find_first_step((r for r in trials if r["seed"] == s), below) for s in values]
            cells.append(", ".join(f"{step:.0f}" for step in steps))
        table.append(tuple(cells))
    return table


def _describe_differences(differences: Sequence[float]) -> str:
    """Return the mean of paired differences with its standard error, which one seed lacks."""
    mean = f"{statistics.mean(differences):+.3f}"
    if len(differences) < 2:
        return f"{mean} (one seed)"
    return f"{mean} ± {statistics.stdev(differences) / len(differences) ** 0.5:.3f}"


def main(argv: list[str] | None = None) -> int:
    """Train all arms, append their rows to the CSV, and print the comparison."""
    parser = argparse.ArgumentParser(prog="python -m lab.method_trials")
    parser.add_argument("task", help="task of the preset")
    parser.add_argument("--preset", choices=[STUDY, "quickstart"], default=STUDY)
    parser.add_argument("--data", type=Path, help="prepared corpora (default: the run root's)")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--every", type=int, default=100, help="steps between evaluations")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--arm", nargs="+", action="append", default=[], metavar=("NAME", "KEY=VALUE")
    )
    parser.add_argument("--average", type=float, nargs="+", default=[], help="decays of averages")
    parser.add_argument("--below", type=float, help="report the first step with such a value")
    parser.add_argument("--output", type=Path, required=True, help="CSV of the results")
    options = parser.parse_args(argv)
    base = build_trial(options.task, options.steps, options.data, options.preset)
    about = {"steps": options.steps, **stamp()}
    done = {(r["task"], r["arm"], r["seed"]) for r in read_csv_rows(options.output)}
    for seed in options.seeds:
        for name, *pairs in [[CONFIGURED], *options.arm]:
            if (options.task, name, str(seed)) in done:
                continue
            keys = {key: yaml.safe_load(text) for key, _, text in (p.partition("=") for p in pairs)}
            config = replace(override_run(base, keys, f"--arm {name}"), seed=seed)
            found = run_trial(config, options.every, options.average).values
            common = {"task": options.task, "arm": name, "settings": " ".join(pairs), "seed": seed}
            names = ("step", "average", "metric", "value")
            rows = [common | dict(zip(names, each, strict=True)) | about for each in found]
            append_csv_rows(options.output, COLUMNS, rows)
            console.print_note(f"{name}, seed {seed}: {rows[-1]['metric']} {rows[-1]['value']}")
    rows = [row for row in read_csv_rows(options.output) if row["task"] == options.task]
    header = ["arm", "average", "each seed", "mean", "spread", "difference ± standard error"]
    if options.below is not None:
        header.append(f"first step at {options.below}")
    console.print_table(options.task, header, summarize_trials(rows, options.below))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
