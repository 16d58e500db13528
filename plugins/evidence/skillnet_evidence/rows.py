"""Plain rows of a comparison, as ``summary.csv``, ``tests.csv`` and ``claims.json`` hold them.

The figures of :mod:`skillnet_evidence.figures` are drawn from these rows, so the report of a study
and the figure of the documents show the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal, NamedTuple

from skillnet_evidence.claims import ClaimResult, ConditionResult, ConditionState
from skillnet_evidence.comparison import MEAN, SHARED_MEAN, SystemComparison, TestVerdict
from skillnet_evidence.scores import SPLIT
from skillnet_evidence.tables import ReferenceScores, average_references

SUMMARY_COLUMNS = (
    "system", "task", "split", "metric", "value", "low", "high", "score", "std_error", "dof",
    "seeds", "tasks", "activated_params", "flops_per_example", "total_params",
)  # fmt: skip
TEST_COLUMNS = (
    "kind", "system", "against", "task", "difference", "low", "high", "std_error", "dof", "seeds",
    "p", "p_corrected", "verdict",
)  # fmt: skip
#: Name of the system in evaluation rows.
REFERENCE_SYSTEM = "simple_baseline"
#: One row of a file of the report.
ReportRow = Mapping[str, Any]

#: Result of a row: of a condition of a claim, or the verdict of a test.
RowResult = ConditionState | TestVerdict

#: Most pairs of systems whose tasks are drawn one by one.
MAX_PAIRS = 4


class ForestRow(NamedTuple):
    """One difference with its interval, as fractions.

    Args:
        label: text at its left.
        change: value, low and high.
        result: key of ``RESULTS``.
        band: differences that the claim allows, from minus the margin; of no width without one.
        is_mean: whether it is about a mean over tasks.
        by_fold: the difference in each fold.
    """

    label: str
    change: tuple[float, float, float]
    result: RowResult
    band: tuple[float, float] = (0.0, 0.0)
    is_mean: bool = False
    by_fold: Sequence[float] = ()


@dataclass(frozen=True)
class ForestGroup:
    """Differences below one title.

    Args:
        title: text of the claim, or the two systems.
        note: verdict and what is subtracted.
        result: state of the claim, for the colour of the note; "open" without one.
        rows: the differences.
    """

    title: str
    note: str
    result: ConditionState
    rows: Sequence[ForestRow]


class SystemPoint(NamedTuple):
    """Mean score of a system, in points, and its cost.

    Args:
        label: label of the system.
        flops: operations of one example, mean over tasks.
        score: value, low and high.
        tasks: number of tasks of both means.
    """

    label: str
    flops: float
    score: tuple[float, float, float]
    tasks: int


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


def build_summary_rows(
    comparison: SystemComparison, references: ReferenceScores | None = None
) -> list[dict[str, Any]]:
    """Return one row per system, task and test set, plus the mean and relative scores.

    Args:
        comparison: computed results.
        references: scores of the simple references, by task and split; rows without intervals.
    """
    rows = build_reference_rows(references or {}, comparison.common_tasks)
    for (label, task, split), score in comparison.scores.items():
        value, low, high = score[:3]
        metric = comparison.metrics.get(task)
        # Scores are inverted back to error rates, which swaps the bounds.
        if metric is not None and not metric.is_higher_better:
            value, low, high = 1 - value, 1 - high, 1 - low
        cost = comparison.costs.get((label, task))
        rows.append(
            {
                "system": label,
                "task": task,
                "split": split,
                "metric": "score" if metric is None else metric.name,
                "value": value,
                "low": low,
                "high": high,
                "score": score.value,
                "std_error": score.std_error,
                "dof": score.dof,
                "seeds": score.seeds,
                "tasks": len(comparison.list_tasks(task, label)),
                "activated_params": cost.activated if cost else None,
                "flops_per_example": cost.flops if cost else None,
                "total_params": fmean(run.total_params for run in comparison.systems[label]),
            }
        )
    for label, relative in comparison.relative.items():
        own = relative.value
        rows.append(
            # The relative score has its own metric name, so that rows stay tidy.
            {"system": label, "task": MEAN, "split": SPLIT, "score": own.value}
            | {"metric": f"relative_to_{relative.against}", **own._asdict()}
        )
        if relative.without_one is not None:
            # Bounds of the value if any task is left out, not an interval.
            low, high = relative.without_one
            name = f"relative_to_{relative.against}_without_one_task"
            row = {"system": label, "task": MEAN, "split": SPLIT, "metric": name}
            rows.append(row | {"low": low, "high": high})
    return rows


def build_test_rows(comparison: SystemComparison) -> list[dict[str, Any]]:
    """Return one row per paired test."""
    return [
        {
            "kind": test.kind,
            "system": test.system,
            "against": test.against,
            "task": test.task,
            "difference": test.difference.value,
            **{k: v for k, v in test.difference._asdict().items() if k != "value"},
            "p": test.p,
            "p_corrected": test.p_corrected,
            "verdict": test.verdict,
        }
        for test in comparison.tests
    ]


def build_claim_rows(claims: Sequence[ClaimResult]) -> list[dict[str, Any]]:
    """Return the claims as plain values, with their verdicts."""
    return [
        {
            "name": claim.name,
            "claim": claim.text,
            "rule": claim.rule,
            "verdict": claim.verdict,
            "undecided_reason": claim.undecided_reason,
            "conditions": [
                _build_condition_row(each, claim.find_state(each)) for each in claim.conditions
            ],
        }
        for claim in claims
    ]


def _build_condition_row(condition: ConditionResult, state: ConditionState) -> dict[str, Any]:
    row: dict[str, Any] = {"text": condition.text, "result": state}
    change, part = condition.change, condition.part
    if change is not None and part is not None:
        row |= {key: getattr(part, key) for key in ("system", "against", "beyond", "test")}
        row |= {key: getattr(condition, key) for key in ("task", "score", "margin", "by_fold")}
        row |= {"subtracted": part.difference, "difference": change.value}
        row |= {"low": change.low, "high": change.high}
    return row


# -- content of figures --------------------------------------------------------------------


def group_claims(claims: Sequence[ReportRow]) -> list[ForestGroup]:
    """Return one group per claim with tested differences.

    Args:
        claims: rows of ``claims.json``.
    """
    groups = []
    verdicts: dict[str, Literal["shown", "refuted"]]
    verdicts = {"holds": "shown", "does not hold": "refuted"}
    for claim in claims:
        tested = [each for each in claim["conditions"] if each.get("task")]
        pairs = list(dict.fromkeys(each["subtracted"] for each in tested))
        if not tested:
            continue
        rows = []
        for each in tested:
            # Several pairs in one claim: the task alone does not identify the row.
            label = each["score"] + (f", {each['subtracted']}" if len(pairs) > 1 else "")
            change = tuple(read_number(each[key]) for key in ("difference", "low", "high"))
            is_mean = each["task"] in (MEAN, SHARED_MEAN)
            band = (-each["margin"], each["margin"] if each["test"] == "equivalent" else 0.0)
            rows.append(
                ForestRow(label, change, each["result"], band, is_mean, each["by_fold"])  # type: ignore[arg-type]
            )
        reason = f" ({claim['undecided_reason']})" if claim["undecided_reason"] else ""
        note = f"{claim['verdict']}: {', '.join(pairs)}{reason}"
        groups.append(
            ForestGroup(claim["claim"], note, verdicts.get(claim["verdict"], "open"), rows)
        )
    return groups


def group_tests(tests: Sequence[ReportRow]) -> list[ForestGroup]:
    """Return the paired tests as groups: one per pair, or the means of many pairs in one.

    Args:
        tests: rows of ``tests.csv``.
    """
    pairs: dict[tuple[str, str, str], list[ForestRow]] = {}
    for row in tests:
        change = tuple(read_number(row[key]) for key in ("difference", "low", "high"))
        system, against, verdict = row["system"], row["against"], row["verdict"]
        if row["kind"] == "system":
            # The reference is the subject, as in the answer.
            change, system, against = (-change[0], -change[2], -change[1]), against, system
            verdict = {"higher": "lower", "lower": "higher"}.get(verdict, verdict)
        name = row["task"].replace("_", " ")
        entry = ForestRow(name, change, verdict, is_mean=row["task"] == MEAN)  # type: ignore[arg-type]
        pairs.setdefault((row["kind"], system, against), []).append(entry)
    note = "95 % intervals; marks are corrected for all tests of the report"
    if len(pairs) <= MAX_PAIRS:
        return [
            ForestGroup(f"{system} − {against}", note, "open", rows)
            for (_, system, against), rows in pairs.items()
        ]
    means = []
    for (_, system, against), rows in pairs.items():
        # Systems with one common task have no mean beside its score.
        for entry in [each for each in rows if each.is_mean] or rows:
            task = f", {entry.label}" if len(rows) > 1 and not entry.is_mean else ""
            means.append(entry._replace(label=f"{system} − {against}{task}"))
    return [ForestGroup("Mean score over tasks", note, "open", means)]


def collect_points(summary: Sequence[ReportRow]) -> list[SystemPoint]:
    """Return the mean score and the cost of each system.

    Args:
        summary: rows of ``summary.csv``.
    """
    points = []
    for row in summary:
        if (row["task"], row["split"], row["metric"]) != (MEAN, SPLIT, "score"):
            continue
        # The simple references have no operations.
        flops = read_number(row.get("flops_per_example"))
        if flops > 0:
            tasks = int(row["tasks"])
            points.append(SystemPoint(row["system"], flops, read_points(row), tasks))
    # Colours follow the order, which is that of the tables.
    return sorted(points, key=lambda point: -point.score[0])


def read_points(row: ReportRow) -> tuple[float, float, float]:
    """Return the score of a row of ``summary.csv`` with its interval, in points."""
    value, low, high = (100 * read_number(row.get(key)) for key in ("value", "low", "high"))
    return value, low, high


def read_number(value: Any) -> float:
    """Return a number of a file of the report; NaN where it is unknown."""
    # A cell of a CSV file is empty where a number is unknown, JSON has null.
    return float("nan") if value in (None, "") else float(value)
