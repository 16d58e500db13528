"""Scores of runs as plain data, and files of them from any project: see :func:`read_scores`.

A table has one line per system, seed, task and row. ``FILE_FORMAT`` lists its columns; the command
line shows it. :mod:`skillnet_evidence.readers.formats` reads tables and the results of other tools.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from skillnet_evidence.errors import EvidenceError, require_known
from skillnet_evidence.readers.formats import read_lines
from skillnet_evidence.readers.lines import ScoreLines
from skillnet_evidence.units import RowOutcomes, number_units

FILE_FORMAT = """\
One line per system, seed, task and row, in CSV (UTF-8) or Parquet, with the columns:

column   default   meaning
system   required  label; one in -pretrained is compared with others in -pretrained
seed     required  whole number
task     required  name of the task
row      required  name or number of the row, equal for all systems and seeds
score    required  result of the row: 0, 1, true, false or between; at most its weight, and
                   not below minus its weight (a correlation may be negative)
unit     the row   what rows have in common, such as a speaker: they are not independent
weight   1         denominator of the row: its symbols, its queries
metric   score     name of the metric, one for each task
errors   false     true if the score counts errors; it may exceed the weight
split    test      only test is tested; further test sets get intervals
fold     none      number of the fold of cross-validation that the run tests
flops    unknown   operations of one example, for claims about costs

The metric of a task is sum(score) / sum(weight).
"""

#: Split of significance tests, scores and costs.
SPLIT = "test"

#: Columns of a file of scores -> their defaults; None if the column is required.
COLUMNS: Mapping[str, str | None] = {
    "system": None, "seed": None, "task": None, "row": None, "score": None,
    "unit": "", "weight": "1", "metric": "score", "errors": "false", "split": SPLIT,
    "fold": "-1", "flops": "nan",
}  # fmt: skip

#: Texts of a score that is right or wrong.
TRUTH = {"true": 1.0, "false": 0.0}
#: Above every seed.
REPLICATE_BASE = 2**32


class TaskCost(NamedTuple):
    """Cost of one example of a task in one system.

    Args:
        activated: parameters that the example reads.
        flops: floating-point operations of the forward pass.
    """

    activated: float
    flops: float


class ScoredMetric(NamedTuple):
    """A metric whose values are scores, or errors.

    Args:
        name: name in the files.
        is_higher_better: whether more is better; errors are subtracted from 1.
        label: text of its score in tables.
    """

    name: str
    is_higher_better: bool = True
    label: str = ""

    def score(self, value: float) -> float:
        """Return the score of a value, at least 0, of which a higher one is better."""
        return max(value if self.is_higher_better else 1.0 - value, 0.0)


class RunFold(NamedTuple):
    """The fold whose rows a run tests.

    Args:
        number: number of the fold, from 0.
        test_to_train: test rows per training row; None without folds.
        plan: text that is equal for runs with the same folds.
    """

    number: int = 0
    test_to_train: float | None = None
    plan: str = ""


NO_FOLD = RunFold()


@dataclass(frozen=True)
class ScoredRun:
    """Outcomes and costs of one run: one seed, and with folds one fold, of one system.

    Args:
        label: name of the system in the report.
        seed: seed of the training.
        outcomes: (task, split) -> result of each row or unit.
        metrics: task -> its metric.
        name: where the outcomes are from, for error messages.
        fold: fold of the test rows.
        costs: task -> cost of an example of the split ``test``.
        steps: training steps.
        seconds: seconds in the training loop.
        pretraining_seconds: the same of the pretraining; None without one.
        source: object of the caller that was scored; not read here.
        total_params: parameters of the complete model; NaN if unknown.
    """

    label: str
    seed: int
    outcomes: Mapping[tuple[str, str], RowOutcomes]
    metrics: Mapping[str, ScoredMetric]
    name: str = ""
    fold: RunFold = NO_FOLD
    costs: Mapping[str, TaskCost] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0
    pretraining_seconds: float | None = None
    source: Any = None
    total_params: float = float("nan")

    @property
    def replicate(self) -> int:
        """Number of the replicate: the seed, and the number of the fold in the higher digits."""
        return self.fold.number * REPLICATE_BASE + self.seed


# -- files ---------------------------------------------------------------------------------


def read_scores(path: Path) -> list[ScoredRun]:
    """Read the scores of rows; return a run for each system, seed and fold.

    Args:
        path: file or folder of a format that :func:`read_lines` knows.

    Raises:
        EvidenceError: see :func:`read_lines` and :func:`build_runs`.
    """
    return build_runs(read_lines([path]))


def build_runs(lines: ScoreLines) -> list[ScoredRun]:
    """Return a run for each system, seed and fold of lines of scores.

    Args:
        lines: lines with the columns of ``FILE_FORMAT``.

    Raises:
        EvidenceError: a line lacks a value, has one of another kind, or repeats a row; or systems
            and seeds have different rows.
    """
    path, table = lines.source, _ScoreTable(lines)
    metrics = table.find_metrics()
    groups: dict[tuple[str, int, int, str, str], dict[str, int]] = {}
    for number, row in enumerate(table.columns["row"]):
        names = [table.columns[key][number] for key in ("system", "task", "split")]
        key = (names[0], int(table.seeds[number]), int(table.folds[number]), names[1], names[2])
        placed = groups.setdefault(key, {})
        if placed.setdefault(row, number) != number:
            table.reject(number, "row", f"{row!r} is also in {table.places[placed[row]]}")
    folds = set(table.folds)
    # Each fold is tested by runs that train on all others.
    ratio = None if folds == {-1} else 1 / max(len(folds) - 1, 1)
    outcomes: dict[tuple[str, int, int], dict[tuple[str, str], RowOutcomes]] = {}
    costs: dict[tuple[str, int, int], dict[str, TaskCost]] = {}
    known: dict[tuple[int, str, str], tuple[str, list[str]]] = {}
    for (system, seed, fold, task, split), placed in groups.items():
        # All runs number their rows and units alike.
        numbers = [placed[row] for row in sorted(placed)]
        units = [table.columns["unit"][n] or f"row {table.columns['row'][n]}" for n in numbers]
        name = f"{system}, seed {seed}"
        rows = [f"{row}, unit {unit}" for row, unit in zip(sorted(placed), units, strict=True)]
        other, wanted = known.setdefault((fold, task, split), (name, rows))
        if differing := sorted(set(rows) ^ set(wanted)):
            raise EvidenceError(
                f"{path}: {name} and {other} have different rows of {task} {split}, such as row "
                f"{differing[0]}; give all systems and seeds the same rows and units"
            )
        values = table.scores[numbers], table.weights[numbers], np.full(len(rows), np.nan)
        if not values[1].any():
            raise EvidenceError(f"{path}: {name}: the weights of {task} {split} sum to 0")
        own = outcomes.setdefault((system, seed, fold), {})
        own[task, split] = RowOutcomes(*values, number_units(units))
        if split == SPLIT and not np.isnan(table.flops[numbers]).any():
            cost = TaskCost(np.nan, float(table.flops[numbers].mean()))
            costs.setdefault((system, seed, fold), {})[task] = cost
    return [
        ScoredRun(
            system,
            seed,
            own,
            {task: metrics[task] for task, _ in own},
            f"{path}: {system}, seed {seed}",
            RunFold(max(fold, 0), ratio),
            costs.get((system, seed, fold), {}),
        )
        for (system, seed, fold), own in outcomes.items()
    ]


class _ScoreTable:
    """Columns of a file of scores, with the place of each row for messages.

    Args:
        lines: its lines, as a reader returns them.
    """

    def __init__(self, lines: ScoreLines) -> None:
        path, header, rows, self.places = lines.source, lines.columns, lines.rows, lines.places
        required = [name for name, default in COLUMNS.items() if default is None]
        if absent := [name for name in required if name not in header]:
            raise EvidenceError(f"{path}: the column {absent[0]!r} is missing")
        for name in header:
            if list(header).count(name) > 1:
                raise EvidenceError(f"{path}: two columns are named {name!r}")
        require_known(header, COLUMNS, path, "column")
        if not rows:
            raise EvidenceError(f"{path}: no rows below the header")
        for number, row in enumerate(rows):
            if len(row) != len(header):
                self.reject(number, "", f"{len(row)} values for {len(header)} columns")
        given = dict(zip(header, zip(*rows, strict=True), strict=True))
        self.columns: dict[str, list[str]] = {}
        for name, default in COLUMNS.items():
            texts = [str(text).strip() for text in given.get(name, [""] * len(rows))]
            if default is None and "" in texts:
                self.reject(texts.index(""), name, "no value")
            self.columns[name] = [text or default or "" for text in texts]
        self.seeds = self._parse("seed", whole=True)
        self.folds = self._parse("fold", whole=True)
        self.scores, self.weights = self._parse("score"), self._parse("weight")
        self.flops = self._parse("flops")
        if self.folds.min() < 0 <= self.folds.max():
            self.reject(int(self.folds.argmin()), "fold", "no value, but other rows have a fold")

    def find_metrics(self) -> dict[str, ScoredMetric]:
        """Return task -> metric; each row has one of its task, and a score in its range."""
        found: dict[str, ScoredMetric] = {}
        for number, task in enumerate(self.columns["task"]):
            if task == "mean":
                self.reject(number, "task", "'mean' is the mean over tasks; name the task")
            name, errors = self.columns["metric"][number], self.columns["errors"][number].lower()
            if errors not in ("true", "false", "1", "0"):
                self.reject(number, "errors", f"expected true or false, got {errors!r}")
            label = "" if name == "score" else name.replace("_", " ")
            is_error = errors in ("true", "1")
            label = f"1 − {label or 'error'}" if is_error else label
            metric = found.setdefault(task, ScoredMetric(name, not is_error, label))
            if (metric.name, not metric.is_higher_better) != (name, is_error):
                self.reject(number, "metric", f"{task} has the metric {metric.name} above")
            score, weight = self.scores[number], self.weights[number]
            if not is_error and score > weight:
                text = f"{score:g} is above the weight {weight:g} of its row"
                self.reject(number, "score", f"{text}; give scores as fractions")
            if score < (0 if is_error else -weight):
                text = f"{score:g} is below {'0' if is_error else f'minus the weight {weight:g}'}"
                self.reject(number, "score", f"{text}; give scores as fractions")
        return found

    def reject(self, number: int, column: str, problem: str) -> NoReturn:
        """Raise EvidenceError about a row.

        Args:
            number: number of the row, from 0.
            column: name of the column; "" for the whole row.
            problem: what is wrong.
        """
        place = f"{self.places[number]}, column {column}" if column else self.places[number]
        raise EvidenceError(f"{place}: {problem}")

    def _parse(self, name: str, whole: bool = False) -> NDArray[np.float64]:
        default = COLUMNS[name]
        values = []
        for number, text in enumerate(self.columns[name]):
            try:
                value = TRUTH[text.lower()] if text.lower() in TRUTH else float(text)
            except ValueError:
                value = np.nan
            least = -REPLICATE_BASE if name == "score" else 0
            is_valid = least <= value < REPLICATE_BASE and (value.is_integer() or not whole)
            # A default, such as "nan" for unknown costs, is outside of the range.
            if text != default and not is_valid and not (name == "flops" and 0 <= value < np.inf):
                kind = "whole number" if whole else "number"
                bound = "" if name == "score" else " from 0"
                self.reject(number, name, f"expected a {kind}{bound}, got {text!r}")
            values.append(value)
        return np.array(values, np.float64)
