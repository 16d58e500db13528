"""How often a study of rotating folds is right: ``python -m lab.fold_coverage``.

Eight equal systems answer the folds of the final study, each fold with one run per system.
``fold_units.csv`` has the units of its corpora in each fold (``--data`` writes it again), and
:mod:`lab.study_coverage` the variances of its tasks.

Runs of two folds share training rows, so a system may be better or worse in all of them. The size
of this effect is unknown. The correction of Nadeau and Bengio assumes its variance as a share of
the variance of one run. The simulation has no such effect, the assumed one, or twice its variance.
Scores are drawn from the variances of units and seeds, or from the residuals that the folds of the
final study had: each system's scores without its mean and without what all systems share in a fold.
The measures are those of :mod:`lab.study_coverage`.
"""

import csv
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lab import RESULTS
from lab.study_coverage import (
    EffectSpread,
    SimulatedTask,
    build_parser,
    measure_studies,
    read_tasks,
    report_rows,
)
from pipelines.data.config.folds import FoldConfig
from pipelines.data.shards.dataset import open_corpus
from pipelines.data.shards.folds import list_row_units, open_fold
from skillnet_evidence import statistics
from skillnet_evidence.comparison import MEAN
from skillnet_evidence.scores import SPLIT
from skillnet_evidence.statistics import RunSample
from skillnet_platform.tables import write_csv
from skillnet_studies.analysis.finished_runs import compare_runs, label_runs
from skillnet_studies.study.study import read_study_runs

FOLD_UNITS = Path(__file__).with_name("fold_units.csv")
#: ``fold`` of ``configs/studies/final.yaml``.
FOLDS = FoldConfig(14, validation_share=0.1, reserve_part=True)
#: Task -> corpus of ``configs/studies/final.yaml``.
CORPORA = {
    "text_classification": "headings",
    "speech_recognition": "syllables_voices",
    "text_to_image": "drawings_artists",
    "text_to_video": "strokes",
    "text_to_code": "functions_packages",
}
#: Systems of the final study -> index of their spread over seeds in ``TaskComponents.each``. The
#: separate SkillNets were in no earlier study and take the spread of SkillNet.
SYSTEMS = {
    "skillnet": 0, "skillnet-pretrained": 1, "skillnet-alone": 0, "specialist": 2,
    "specialist-pretrained": 3, "moe-pretrained": 5, "moe": 4, "dense-executed": 6,
}  # fmt: skip
#: Pairs (system, against) of the tests of a report of these systems.
FOLD_PAIRS = ((2, 0), (3, 0), (6, 0), (7, 0), (4, 1), (5, 1), (1, 0), (4, 3), (5, 6))


@dataclass(frozen=True)
class FoldedTask:
    """The units of one task in all folds.

    Args:
        size_K: rows of each unit.
        fold_K: fold that tests each unit.
        task: variances, see :class:`SimulatedTask`.
    """

    size_K: NDArray[np.int64]
    fold_K: NDArray[np.int64]
    task: SimulatedTask

    def draw_folds(self, random: np.random.Generator, spread: EffectSpread) -> NDArray[np.float64]:
        """Return the mean of one kind of effect over the rows of each fold, (folds,).

        Args:
            random: generator.
            spread: standard error of the effect, and its degrees of freedom.
        """
        by_unit, by_row = self.task.split_variance(spread)
        sum_K = random.normal(0, 1, len(self.size_K)) * self.size_K * by_unit**0.5
        sum_K += random.normal(0, 1, len(self.size_K)) * (by_row * self.size_K) ** 0.5
        return np.bincount(self.fold_K, sum_K) / np.bincount(self.fold_K, self.size_K)

    def expect_variance(self, spread: EffectSpread) -> float:
        """Return the variance of such a mean, averaged over the folds.

        Args:
            spread: standard error of the effect, and its degrees of freedom.
        """
        by_unit, by_row = self.task.split_variance(spread)
        rows_F = np.bincount(self.fold_K, self.size_K)
        squares_F = np.bincount(self.fold_K, self.size_K**2)
        return float(np.mean((by_unit * squares_F + by_row * rows_F) / rows_F**2))


@dataclass(frozen=True)
class FoldDesign:
    """One line of the simulation.

    Args:
        training_effect: variance of the effect of shared training rows, as a multiple of the
            variance that the correction assumes.
        is_spread_seen: whether each system has the spread over seeds that it had in the study of
            five seeds; otherwise all have the pooled one.
        has_residuals: whether the scores are drawn from the residuals of the final study.
    """

    training_effect: float
    is_spread_seen: bool = False
    has_residuals: bool = False

    @property
    def name(self) -> str:
        """Name of the line."""
        spread = "spreads as seen" if self.is_spread_seen else "equal spreads"
        spread = "residuals of the study" if self.has_residuals else spread
        return f"14 folds, training effect {self.training_effect:g}, {spread}"


def read_folds(path: Path = FOLD_UNITS) -> dict[str, FoldedTask]:
    """Return task -> its units in all folds.

    Args:
        path: CSV file with the columns task, fold, rows, units: how many units of a fold have how
            many rows.
    """
    sizes: dict[str, list[tuple[int, int]]] = {}
    with path.open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            unit = (int(row["rows"]), int(row["fold"]))
            sizes.setdefault(row["task"], []).extend([unit] * int(row["units"]))
    tasks = read_tasks()
    folded = {}
    for task, units in sizes.items():
        size_K, fold_K = np.array(units, np.int64).T
        folded[task] = FoldedTask(size_K, fold_K, tasks[task])
    return folded


def count_units(data: Path) -> list[dict[str, str | int]]:
    """Return the rows of ``fold_units.csv``: how many units of a fold have how many rows.

    Args:
        data: directory of the prepared corpora.

    Raises:
        UserError: a corpus is missing.
    """
    rows: list[dict[str, str | int]] = []
    for task, name in CORPORA.items():
        corpus = open_corpus(data / name)
        for fold in range(FOLDS.count):
            split = open_fold(corpus, replace(FOLDS, number=fold)).splits["test"]
            tables = (split.open_shard(shard).table for shard in split.shards)
            sizes = Counter(unit for table in tables for unit in list_row_units(table, name))
            rows += [
                {"task": task, "fold": fold, "rows": size, "units": count}
                for size, count in sorted(Counter(sizes.values()).items())
            ]
    return rows


def read_residuals(folder: Path = RESULTS / "final") -> dict[tuple[str, str], NDArray[np.float64]]:
    """Return (system, task) -> residuals of the folds of a kept study, (folds,).

    Args:
        folder: the kept study.
    """
    runs = label_runs(read_study_runs(folder))
    comparison = compare_runs(runs)
    residuals: dict[tuple[str, str], NDArray[np.float64]] = {}
    for task in comparison.common_tasks:
        score_SF = np.stack([comparison.samples[label, task, SPLIT].values for label in SYSTEMS])
        rest_SF = score_SF - score_SF.mean(1, keepdims=True)
        rest_SF = rest_SF - rest_SF.mean(0)
        count, folds = rest_SF.shape
        # Both means are estimates: the residuals vary less than the scores did.
        rest_SF *= (count / (count - 1) * folds / (folds - 1)) ** 0.5
        residuals |= {(label, task): rest_SF[place] for place, label in enumerate(SYSTEMS)}
    return residuals


def draw_folded_study(
    tasks: Mapping[str, FoldedTask],
    design: FoldDesign,
    random: np.random.Generator,
    residuals: Mapping[tuple[str, str], NDArray[np.float64]] | None = None,
) -> dict[tuple[int, str], RunSample]:
    """Return (system, task) -> the scores of a study of equal systems.

    Args:
        tasks: units of the folds.
        design: systems, folds, units and variances of the study.
        random: generator.
        residuals: result of :func:`read_residuals`, for a design that draws from them.
    """
    samples: dict[tuple[int, str], RunSample] = {}
    ratio = FOLDS.test_to_train
    for task, own in tasks.items():
        of = own.task.components
        effect = design.training_effect * ratio
        # Training rows that help one system help all: a difference does not contain this part.
        common_F = own.draw_folds(random, of.common) + random.normal(
            0, (effect * own.expect_variance(of.common)) ** 0.5
        )
        answers = own.expect_variance(of.system) + own.expect_variance(of.rest)
        for system, (label, index) in enumerate(SYSTEMS.items()):
            seeds = (of.choose_seed_spread(index if design.is_spread_seen else None) / 100) ** 2
            shared = effect * (seeds + answers)
            if design.has_residuals:
                assert residuals is not None
                rest_F = residuals[label, task]
                shared = effect * float((rest_F**2).mean())
            score_F = of.score + common_F + random.normal(0, shared**0.5)
            if design.has_residuals:
                score_F = score_F + random.choice(rest_F, len(common_F))
            else:
                score_F = score_F + random.normal(0, seeds**0.5, len(common_F))
                score_F += own.draw_folds(random, of.system) + own.draw_folds(random, of.rest)
            samples[system, task] = statistics.build_fold_sample(
                dict(enumerate(score_F.tolist())), ratio
            )
    for system in range(len(SYSTEMS)):
        samples[system, MEAN] = statistics.average_samples([samples[system, t] for t in tasks])
    return samples


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``python -m lab.fold_coverage``."""
    parser = build_parser("fold_coverage", __doc__)
    parser.add_argument("--data", type=Path, help="prepared corpora; writes fold_units.csv only")
    options = parser.parse_args(argv)
    if options.data is not None:
        write_csv(FOLD_UNITS, count_units(options.data), digits=".2f")
        return 0
    tasks, rows = read_folds(), []
    truths = {name: own.task for name, own in tasks.items()}
    residuals = read_residuals()
    designs = [
        design
        for effect in (0.0, 1.0, 2.0)
        for design in (
            FoldDesign(effect),
            FoldDesign(effect, is_spread_seen=True),
            FoldDesign(effect, has_residuals=True),
        )
    ]
    for design in designs:
        random = np.random.default_rng(0)
        drawn = (
            draw_folded_study(tasks, design, random, residuals) for _ in range(options.studies)
        )
        rows += measure_studies(drawn, truths, FOLD_PAIRS, design.name)
        print(f"measured: {design.name}", flush=True)
    return report_rows(rows, options.output)


if __name__ == "__main__":
    raise SystemExit(main())
