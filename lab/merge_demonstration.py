"""Two tasks grown apart and merged, against joint, sequential and averaged training.

    skillnet prepare radicals --config prepare/stroke-counts
    python -m lab.merge_demonstration --base my-run --steps 300 --seeds 0 1 2

For each seed, the base grows by the task ``stroke_count`` and, apart from it, by ``radical``, each
with a skill of its own; ``skillnet merge`` joins both (``merged``). The other arms start from the
same base, with the rows, steps per task, batch size and learning rate of ``configs/grow``:

apart, all trained   one model per task; nothing is frozen
averaged             these two models, joined with ``--average_shared``
sequential           ``radical`` is grown from the model with ``stroke_count``, and reads its skill
joint                both skills at once in one run; the old files are frozen

Each run has a name below the run root, so the same command continues after a kill. After each arm
of each seed, ``scores.csv`` has the primary metrics of all tasks with intervals over held-out
units, and ``summary.csv`` their means over seeds, with intervals over seeds and units together.
"""

import argparse
import collections
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lab import RESULTS
from pipelines.finetune import run_end_to_end
from pipelines.grow import grow_model
from pipelines.grow import main as grow_command
from pipelines.merge import merge_trained_models
from pipelines.training.config.growth import GrowConfig, MergeConfig, Reference
from pipelines.training.config.run import FinetuneConfig, TaskTraining
from pipelines.training.evaluation import tables
from pipelines.training.evaluation.outcomes import OUTCOMES_FILE, OutcomeTable, read_outcomes
from pipelines.training.runs.layout import SOURCE, SOURCE_ROWS
from skillnet.skills import SkillPlan
from skillnet_evidence import statistics
from skillnet_evidence.statistics import RunSample
from skillnet_platform import console
from skillnet_platform.storage import read_json, run_root
from skillnet_platform.tables import write_csv
from skillnet_platform.tracking import TrackingConfig

#: Arm that the others are subtracted from.
MERGED = "merged"
#: Model before the new tasks.
BASE = "base"
SCORES, SUMMARY = "scores.csv", "summary.csv"
FIRST_PRESET, SECOND_PRESET = "grow/stroke-count", "grow/radical"
#: Name of the reference run of a growth in which nothing is frozen.
ALL_TRAINED: Reference = "everything"

#: Task and split.
SplitKey = tuple[str, str]


@dataclass(frozen=True)
class ArmRun:
    """A trained model of one arm and seed, or one of several.

    Args:
        arm: name of the arm.
        seed: start of the random numbers of its training.
        evaluation: evaluation rows of the model.
        outcomes: outcomes of its test rows.
        identical: task and split -> whether all outputs equal those of its parents to the bit;
            empty if they were not compared.
        steps: training steps per new task.
        base: digest of the base.
        tasks: tasks that this model stands for; None for all.
    """

    arm: str
    seed: int
    evaluation: Sequence[Mapping[str, Any]]
    outcomes: OutcomeTable
    steps: int
    base: str
    identical: Mapping[SplitKey, bool] = field(default_factory=dict)
    tasks: tuple[str, ...] | None = None

    def list_primary_rows(self) -> list[Mapping[str, Any]]:
        """Return the rows of primary metrics on test splits of the tasks."""
        return [
            row
            for row in self.evaluation
            if row["split"].startswith("test")
            and row["metric"] in tables.PRIMARY_METRICS
            and (self.tasks is None or row["task"] in self.tasks)
        ]


@dataclass(frozen=True)
class SeedDemonstration:
    """The arms of one seed; each property of a run trains it, or finds it finished.

    Args:
        base: the model that grows, as in ``skillnet grow``.
        seed: start of the random numbers of all trainings.
        steps: training steps per new task.
        digest: SHA-256 of the base.
    """

    base: str
    seed: int
    steps: int
    digest: str

    @property
    def tracking(self) -> TrackingConfig:
        """Nothing is registered: the arms are no versions of one model."""
        return TrackingConfig(register=False, system_metrics=False)

    def name_run(self, arm: str) -> str:
        """Return the name of a run.

        Args:
            arm: what the run trains.
        """
        return f"merging-{arm}-{self.seed}-{self.steps}"

    def read_growth(self, preset: str) -> GrowConfig:
        """Return the growth of a preset, with a reference run in which nothing is frozen.

        Args:
            preset: name of the configuration.
        """
        config = grow_command.parse_arguments([self.base, "--config", preset])
        return replace(
            config,
            name=self.name_run(config.task.name),
            seed=self.seed,
            run_dir=str(run_root()),
            training=replace(config.training, steps=self.steps),
            references=[ALL_TRAINED],
            tracking=self.tracking,
        )

    def train_arms(self) -> Iterator[list[ArmRun]]:
        """Train the arms one after the other; yield the models of each."""
        growths = [self.read_growth(preset) for preset in (FIRST_PRESET, SECOND_PRESET)]
        folders = [Path(grow_model(growth)["run"]) for growth in growths]
        yield [
            self._build_run(
                BASE, read_json(folders[0] / SOURCE_ROWS), folders[0] / f"{SOURCE}-{OUTCOMES_FILE}"
            )
        ]
        yield [self._merge(MERGED, folders)]
        apart = [folder / "references" / f"{folder.name}-{ALL_TRAINED}" for folder in folders]
        yield [
            self._read_run("apart, all trained", folder, (growth.task.name,))
            for folder, growth in zip(apart, growths, strict=True)
        ]
        yield [self._merge("averaged", apart)]
        yield [self._train_sequentially("sequential", growths, folders[0])]
        yield [self._train_jointly("joint", growths)]

    def _build_run(
        self, arm: str, rows: Sequence[Mapping[str, Any]], outcomes: Path, **more: Any
    ) -> ArmRun:
        return ArmRun(
            arm, self.seed, rows, read_outcomes(outcomes), self.steps, self.digest, **more
        )

    def _read_run(self, arm: str, folder: Path, tasks: tuple[str, ...] | None = None) -> ArmRun:
        rows = read_json(folder / "result.json")["evaluation"]
        return self._build_run(arm, rows, folder / OUTCOMES_FILE, tasks=tasks)

    def _merge(self, arm: str, parents: Sequence[Path]) -> ArmRun:
        result = merge_trained_models(
            MergeConfig(
                [str(folder) for folder in parents],
                name=self.name_run(arm),
                average_shared=arm != MERGED,
                run_dir=str(run_root()),
                tracking=self.tracking,
            )
        )
        identical: dict[SplitKey, bool] = {}
        for task in result["merge"]["tasks"]:
            key = task["task"], task["split"]
            # A task of the base has an entry for each parent.
            identical[key] = identical.get(key, True) and task["is_identical"]
        return self._build_run(
            arm, result["evaluation"], Path(result["run"]) / OUTCOMES_FILE, identical=identical
        )

    def _train_sequentially(self, arm: str, growths: Sequence[GrowConfig], first: Path) -> ArmRun:
        second = growths[1]
        assert growths[0].skill is not None
        # With the plan of the other arms, the growth would repeat the one apart, bit for bit.
        plan = second.task.towers["input"]
        plan = SkillPlan((*plan.skills, growths[0].skill.name), plan.modality)
        config = replace(
            second,
            source=str(first),
            name=self.name_run(arm),
            task=replace(second.task, towers={"input": plan}),
            references=[],
        )
        return self._read_run(arm, Path(grow_model(config)["run"]))

    def _train_jointly(self, arm: str, growths: Sequence[GrowConfig]) -> ArmRun:
        config = replace(build_joint_config(growths), name=self.name_run("joint-frozen"))
        result = run_end_to_end(config, "finetune")
        return self._read_run(arm, Path(result["run"]))


def build_joint_config(growths: Sequence[GrowConfig]) -> FinetuneConfig:
    """Return the run that trains the new skills and tasks of several growths at once.

    Each task has the initial weights of its growth and as many steps. The old files are frozen.

    Args:
        growths: from one base, with equal seeds and steps.
    """
    # torch loads here, so that --help is fast.
    from pipelines.training.growth import runs
    from pipelines.training.growth.verification import added_files
    from pipelines.training.runs import model_source

    source = model_source.resolve_model(growths[0].source)
    before = runs.load_growable_model(source)
    model = before
    tasks: dict[str, TaskTraining] = {}
    for growth in growths:
        settings = runs.build_growth_config(growth, source, before)
        model = runs.build_grown_model(growth, model, settings.model.tasks[growth.task.name])
        tasks |= settings.tasks | {growth.task.name: replace(growth.task.training, weight=1.0)}
    training = replace(
        settings.training,
        steps=sum(growth.training.steps for growth in growths),
        trainable=added_files(before, model),
    )
    start = runs.save_start_model(model, str(settings.run_dir))
    return replace(settings, model=model.config, tasks=tasks, training=training, init_from=start)


def build_score_rows(runs: Iterable[ArmRun]) -> list[dict[str, Any]]:
    """Return a row per model, task and test split, with the interval over held-out units.

    Args:
        runs: results of all arms and seeds.
    """
    rows = []
    for run in runs:
        for row in run.list_primary_rows():
            key = row["task"], row["split"]
            is_identical = run.identical.get(key)
            rows.append(
                {"arm": run.arm, "seed": run.seed}
                | {name: row[name] for name in ("task", "split", "metric", "value", "low", "high")}
                | {
                    "rows": len(run.outcomes[key]),
                    "is_identical": "" if is_identical is None else is_identical,
                    "activated_params": row["activated_params"],
                    "steps": run.steps,
                    "base": run.base[:16],
                    "date": row["date"],
                    "machine": row["machine"],
                }
            )
    return rows


def build_summary_rows(runs: Sequence[ArmRun]) -> list[dict[str, Any]]:
    """Return a row per arm, task and test split: the mean over seeds, and merged minus the arm.

    Intervals cover seeds and held-out units together, see
    :mod:`skillnet_evidence.statistics`.

    Args:
        runs: results of all arms and seeds.
    """
    found: dict[tuple[str, str, str], dict[str, dict[int, ArmRun]]] = {}
    for run in runs:
        for row in run.list_primary_rows():
            arms = found.setdefault((row["task"], row["split"], row["metric"]), {})
            arms.setdefault(run.arm, {})[run.seed] = run
    rows = []
    for (task, split, metric), arms in found.items():
        samples = {arm: _sample_outcomes(by_seed, (task, split)) for arm, by_seed in arms.items()}
        # Tasks of the base are equal in all seeds of some arms, so there is nothing to pool.
        is_new = BASE not in arms
        spread = statistics.pool_seed_variance(list(samples.values())) if is_new else None
        for arm, sample in samples.items():
            mean = statistics.estimate_mean(sample, spread)
            row = {"arm": arm, "task": task, "split": split, "metric": metric}
            row |= {"seeds": mean.seeds, "value": mean.value, "low": mean.low, "high": mean.high}
            is_other = arm != MERGED and MERGED in arms
            if is_other and _has_other_outcomes(arms[MERGED], arms[arm], (task, split)):
                change = samples[MERGED] - sample
                found_change = statistics.estimate_mean(change, spread)
                row |= {
                    "difference": found_change.value,
                    "difference_low": found_change.low,
                    "difference_high": found_change.high,
                }
            rows.append(row)
    return rows


def _has_other_outcomes(
    one: Mapping[int, ArmRun], other: Mapping[int, ArmRun], key: SplitKey
) -> bool:
    """Return whether a row of a seed has another outcome; equal models have no difference."""
    return any(
        not np.array_equal(one[seed].outcomes[key].numerator, other[seed].outcomes[key].numerator)
        for seed in one.keys() & other.keys()
    )


def _sample_outcomes(by_seed: Mapping[int, ArmRun], key: SplitKey) -> RunSample:
    outcomes = {seed: run.outcomes[key] for seed, run in by_seed.items()}
    first = next(iter(outcomes.values()))
    amounts = {seed: each.numerator for seed, each in outcomes.items()}
    return statistics.build_sample(amounts, first.denominator, "/".join(key), first.unit)


def write_results(runs: Sequence[ArmRun], folder: Path) -> None:
    """Write both CSV files, also with some of the arms or seeds.

    Args:
        runs: results of all arms and seeds so far.
        folder: directory of the result.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in ((SCORES, build_score_rows(runs)), (SUMMARY, build_summary_rows(runs))):
        write_csv(folder / name, rows)


def main(argv: list[str] | None = None) -> int:
    """Train all arms and write the result."""
    parser = argparse.ArgumentParser(
        prog="python -m lab.merge_demonstration",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--base", default="models:/skillnet@champion", help="model that grows")
    parser.add_argument("--steps", type=int, default=300, help="training steps per new task")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, help="folder (default: <date>-merge of the results)")
    options = parser.parse_args(argv)
    from pipelines.training.runs.model_source import resolve_model

    digest = resolve_model(options.base).digest
    runs: list[ArmRun] = []
    # Seeds take turns, so that a command that is stopped leaves arms with all seeds.
    waiting = collections.deque(
        SeedDemonstration(options.base, seed, options.steps, digest).train_arms()
        for seed in options.seeds
    )
    while waiting:
        arms = waiting.popleft()
        found = next(arms, None)
        if found is None:
            continue
        waiting.append(arms)
        runs += found
        # The date of the first measurement, so that a resumed command writes to one folder.
        date = min(row["date"] for run in runs for row in run.evaluation)
        folder = options.output or RESULTS / f"{date[:10]}-merge"
        write_results(runs, folder)
        console.print_note(f"{found[0].arm}, seed {found[0].seed}: written to {folder}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
