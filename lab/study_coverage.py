"""How often a study is right, with known truth: ``python -m lab.study_coverage``.

Nine equal systems answer the five test sets of the headline study, with its seeds. Rows of a
held-out unit resemble each other. ``study_units.csv`` has the units of the built-in test splits,
and ``COMPONENTS`` the variances of the study's outcomes (kept in its ``outcomes.parquet``).

Measured for each task and the mean score: how often the 95 % interval of a score covers the truth,
how often a test of two equal systems is significant at 5 %, and how often a system that is exactly
a margin worse passes as not inferior (nominal 2.5 %). For all 66 tests together: how often Holm's
correction leaves any significant difference (nominal 5 %). Prints Markdown; ``--output`` writes a
CSV file.
"""

import argparse
import csv
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from skillnet_evidence import statistics
from skillnet_evidence.cells import markdown_table
from skillnet_evidence.comparison import MEAN
from skillnet_evidence.statistics import RunSample
from skillnet_evidence.units import ScoreScale
from skillnet_platform.tables import write_csv

UNITS = Path(__file__).with_name("study_units.csv")
LEVEL = 0.05
#: Column of the CSV -> words for it in the table.
MEASURES = {
    "coverage": "covers",
    "false_alarms": "false alarms",
    "non_inferiority": "passes at the margin",
}


class EffectSpread(NamedTuple):
    """Standard error of a test set's mean due to one kind of effect, in points.

    Args:
        rows: if all rows are independent.
        units: if the rows of a unit are as similar as in the study.
    """

    rows: float
    units: float


@dataclass(frozen=True)
class TaskComponents:
    """Variances of one task in the study of five seeds (outcomes of commit 6227d7a).

    Args:
        score: mean score of all systems.
        seeds: standard deviation over seeds without the variance of answers, in points.
        common: effects that all systems share: hard and easy units.
        system: effects of a system and a unit.
        rest: what differs between runs of a system.
        each: standard deviation over seeds of each system as seen, in points.
    """

    score: float
    seeds: float
    common: EffectSpread
    system: EffectSpread
    rest: EffectSpread
    each: tuple[float, ...]

    def choose_seed_spread(self, system: int | None) -> float:
        """Return the standard deviation over seeds without that of answers, in points.

        Args:
            system: index of the system whose own deviation counts; None takes the pooled one.
        """
        if system is None:
            return self.seeds
        return max(self.each[system] ** 2 - self.rest.units**2, 0.0) ** 0.5


COMPONENTS = {
    "text_classification": TaskComponents(
        0.576, 0.47, EffectSpread(0.855, 2.701), EffectSpread(0.179, 0.489),
        EffectSpread(0.469, 0.667), (0.50, 0.79, 0.61, 0.73, 0.77, 0.57, 0.79, 0.52, 0.63),
    ),
    "speech_recognition": TaskComponents(
        0.824, 2.10, EffectSpread(0.778, 0.778), EffectSpread(0.223, 0.223),
        EffectSpread(0.743, 0.743), (4.15, 1.99, 2.47, 0.70, 0.52, 2.42, 0.91, 2.35, 0.77),
    ),
    "text_to_image": TaskComponents(
        0.308, 0.00, EffectSpread(1.820, 1.977), EffectSpread(0.519, 0.560),
        EffectSpread(1.507, 1.549), (1.89, 1.55, 1.06, 2.03, 0.84, 0.71, 0.40, 0.40, 0.40),
    ),
    "text_to_video": TaskComponents(
        0.658, 2.34, EffectSpread(1.125, 1.140), EffectSpread(0.389, 0.391),
        EffectSpread(0.957, 0.966), (1.34, 2.29, 3.32, 3.47, 0.73, 3.00, 3.57, 0.91, 1.66),
    ),
    "text_to_code": TaskComponents(
        0.332, 1.84, EffectSpread(1.299, 2.769), EffectSpread(0.460, 0.682),
        EffectSpread(1.566, 1.771), (2.26, 1.60, 4.24, 3.10, 1.32, 1.84, 1.25, 0.43, 2.23),
    ),
}  # fmt: skip
#: Seeds of each system in the study, in the order of ``TaskComponents.each``: skillnet,
#: specialist, moe (each plain, then pretrained), dense, dense-pretrained, dense-total.
SEEDS = (5, 5, 5, 5, 5, 5, 3, 3, 3)
#: Pairs (system, against) of the study's tests.
PAIRS = (
    (2, 0), (3, 1), (4, 0), (5, 1), (6, 0), (7, 1), (8, 0), (1, 0), (3, 2), (5, 4), (7, 6),
)  # fmt: skip


@dataclass(frozen=True)
class SimulatedTask:
    """The units of one task's test set and the standard deviations of their effects.

    Args:
        unit_N: number of each row's unit.
        components: see :class:`TaskComponents`.
    """

    unit_N: NDArray[np.int64]
    components: TaskComponents

    def draw_rows(
        self, random: np.random.Generator, spread: EffectSpread, count: int
    ) -> NDArray[np.float64]:
        """Return one kind of effect on each row, (count, N).

        Args:
            random: generator.
            spread: standard error of the effect, and its degrees of freedom.
            count: independent draws.
        """
        by_unit, by_row = self.split_variance(spread)
        unit_K = random.normal(0, by_unit**0.5, (count, int(self.unit_N.max()) + 1))
        return unit_K[:, self.unit_N] + random.normal(0, by_row**0.5, (count, len(self.unit_N)))

    def split_variance(self, spread: EffectSpread) -> tuple[float, float]:
        """Return the variance of an effect that rows of a unit share, and of the rest of a row.

        Args:
            spread: standard error of the effect, and its degrees of freedom.
        """
        rows, sizes_K = len(self.unit_N), np.bincount(self.unit_N)
        # Rows of the unit of an average row.
        mates = (sizes_K**2).sum() / rows
        total = (spread.rows / 100) ** 2 * rows
        excess = ((spread.units / 100) ** 2 - (spread.rows / 100) ** 2) * rows
        by_unit = min(excess / (mates - 1), total) if mates > 1 else 0.0
        return by_unit, total - by_unit


def read_tasks(path: Path = UNITS) -> dict[str, SimulatedTask]:
    """Return task -> its units, from a table of sizes.

    Args:
        path: CSV file with the columns task, rows, units: how many units have how many rows.
    """
    sizes: dict[str, list[int]] = {}
    with path.open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            sizes.setdefault(row["task"], []).extend([int(row["rows"])] * int(row["units"]))
    return {
        task: SimulatedTask(np.repeat(np.arange(len(own)), own), COMPONENTS[task])
        for task, own in sizes.items()
    }


@dataclass(frozen=True)
class StudyDesign:
    """One line of the simulation.

    Args:
        seeds: runs of each system.
        has_units: whether the analysis knows the units; otherwise rows count as independent.
        is_spread_seen: whether each system has the spread over seeds that it had in the study;
            otherwise all have the pooled one.
    """

    seeds: tuple[int, ...] = SEEDS
    has_units: bool = True
    is_spread_seen: bool = False

    @property
    def name(self) -> str:
        """Name of the line."""
        units = "by unit" if self.has_units else "rows as independent"
        spread = "spreads as seen" if self.is_spread_seen else "equal spreads"
        return f"{units}, {spread}, {min(self.seeds)} to {max(self.seeds)} seeds"


def draw_study(
    tasks: Mapping[str, SimulatedTask], design: StudyDesign, random: np.random.Generator
) -> dict[tuple[int, str], RunSample]:
    """Return (system, task) -> the scores of a study of equal systems.

    Args:
        tasks: test sets.
        design: systems, seeds, units and variances of the study.
        random: generator.
    """
    samples: dict[tuple[int, str], RunSample] = {}
    for task, own in tasks.items():
        of, weight_N = own.components, np.ones(len(own.unit_N))
        common_N = own.draw_rows(random, of.common, 1)
        for system, count in enumerate(design.seeds):
            spread = of.choose_seed_spread(system if design.is_spread_seen else None)
            rows_SN = of.score + random.normal(0, spread / 100, (count, 1)) + common_N
            rows_SN = rows_SN + own.draw_rows(random, of.system, 1)
            rows_SN += own.draw_rows(random, of.rest, count)
            samples[system, task] = statistics.build_sample(
                dict(enumerate(rows_SN)), weight_N, task, own.unit_N if design.has_units else None
            )
    for system in range(len(design.seeds)):
        samples[system, MEAN] = statistics.average_samples([samples[system, t] for t in tasks])
    return samples


def measure_design(
    tasks: Mapping[str, SimulatedTask], design: StudyDesign, studies: int, start: int = 0
) -> list[dict[str, Any]]:
    """Return a row per task and the mean score, with shares in per cent.

    Args:
        tasks: test sets.
        design: systems, seeds, units and variances of the studies.
        studies: simulated studies.
        start: seed of the generator.
    """
    random = np.random.default_rng(start)
    drawn = (draw_study(tasks, design, random) for _ in range(studies))
    return measure_studies(drawn, tasks, PAIRS, design.name)


def measure_studies(
    drawn: Iterable[Mapping[tuple[int, str], RunSample]],
    tasks: Mapping[str, SimulatedTask],
    pairs: Sequence[tuple[int, ...]],
    design: str,
) -> list[dict[str, Any]]:
    """Return a row per task and the mean score, with shares in per cent.

    Args:
        drawn: studies of equal systems, as (system, task) -> scores.
        tasks: name -> the true score of all systems.
        pairs: (system, against) of the tests; four systems for a difference of two differences.
        design: name of the design.
    """
    names = [*tasks, MEAN]
    truths = {task: own.components.score for task, own in tasks.items()}
    truths[MEAN] = float(np.mean(list(truths.values())))
    covered, alarms, passed = Counter[str](), Counter[str](), Counter[str]()
    families = studies = systems = 0
    for samples in drawn:
        studies += 1
        systems = len({system for system, _ in samples})
        p_values = []
        for name in names:
            spread = statistics.pool_seed_variance([samples[i, name] for i in range(systems)])
            assert spread is not None
            for system in range(systems):
                found = statistics.estimate_mean(
                    samples[system, name], spread, least=0, most=1, scale=_find_scale(name)
                )
                covered[name] += found.low <= truths[name] <= found.high
            for system, against, *beyond in pairs:
                change = samples[system, name] - samples[against, name]
                if beyond:
                    change = change - (samples[beyond[0], name] - samples[beyond[1], name])
                found = statistics.estimate_mean(change, spread)
                p_values.append(statistics.compute_p_value(change, spread))
                alarms[name] += p_values[-1] <= LEVEL
                # Moved down by a margin, the system passes if its interval stays above the margin.
                passed[name] += found.low >= 0
        families += min(statistics.correct_p_values(p_values)) <= LEVEL
    return [
        {
            "design": design,
            "studies": studies,
            "tests": len(p_values),
            "task": name,
            "coverage": 100 * covered[name] / (studies * systems),
            "false_alarms": 100 * alarms[name] / (studies * len(pairs)),
            "non_inferiority": 100 * passed[name] / (studies * len(pairs)),
            "family_wise_error": 100 * families / studies,
        }
        for name in names
    ]


def _find_scale(name: str) -> ScoreScale:
    scales: dict[str, ScoreScale] = {"speech_recognition": "error_rate", MEAN: "free"}
    return scales.get(name, "share")


def format_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the results as a table with a line per design: the range over tasks, and the mean.

    Args:
        rows: result of :func:`measure_studies`, or of the CSV that has them.
    """
    heads = [f"{words}: {of}" for words in MEASURES.values() for of in ("tasks", "mean")]
    lines = []
    for design in dict.fromkeys(row["design"] for row in rows):
        of = {row["task"]: row for row in rows if row["design"] == design}
        cells = [design]
        for measure in MEASURES:
            values = [float(row[measure]) for task, row in of.items() if task != MEAN]
            cells += [f"{min(values):.1f}–{max(values):.1f}", f"{float(of[MEAN][measure]):.1f}"]
        lines.append([*cells, f"{float(of[MEAN]['family_wise_error']):.1f}"])
    columns = ["design", *heads, f"any of {rows[0]['tests']} tests"]
    return markdown_table(columns, lines, len(columns) - 1)


def build_parser(name: str, about: str | None, studies: int = 1000) -> argparse.ArgumentParser:
    """Return the parser of a simulation."""
    parser = argparse.ArgumentParser(prog=f"python -m lab.{name}", description=about)
    parser.add_argument("--studies", type=int, default=studies, help="simulated studies per design")
    parser.add_argument("--output", type=Path, help="CSV file to write")
    return parser


def report_rows(rows: Sequence[Mapping[str, Any]], output: Path | None) -> int:
    """Print the table of a simulation, and write its CSV file if one is named."""
    print(format_markdown(rows))
    if output is not None:
        write_csv(output, rows, digits=".2f")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``python -m lab.study_coverage``."""
    options = build_parser("study_coverage", __doc__).parse_args(argv)
    tasks, rows = read_tasks(), []
    designs = [
        StudyDesign(has_units=False),
        StudyDesign(),
        StudyDesign(is_spread_seen=True),
        StudyDesign((14,) * 9),
        StudyDesign((14,) * 9, is_spread_seen=True),
    ]
    for design in designs:
        rows += measure_design(tasks, design, options.studies)
        print(f"measured: {design.name}", flush=True)
    return report_rows(rows, options.output)


if __name__ == "__main__":
    raise SystemExit(main())
