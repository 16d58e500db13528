"""Content of the figure of a comparison: paired differences, and scores against operations.

Both are read from plain rows, as ``claims.json``, ``tests.csv`` and ``summary.csv`` hold them. So
the report of a study and the figure of the documents show the same. They are drawn by
``skillnet_studies.report.evidence_plots``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from skillnet_studies.analysis.claims import ConditionResult
from skillnet_studies.analysis.comparison import MEAN, SPLIT, TestVerdict

#: One row of a file of the report.
ReportRow = Mapping[str, Any]

#: Result of a row: of a condition of a claim, or the verdict of a test.
RowResult = ConditionResult | TestVerdict

#: Most pairs of systems whose tasks are drawn one by one.
MAX_PAIRS = 4


class ForestRow(NamedTuple):
    """One difference with its interval, as fractions.

    Args:
        label: text at its left.
        change: value, low and high.
        result: key of ``skillnet_studies.report.evidence_plots.RESULTS``.
        margin: loss that the claim allows.
        is_mean: whether it is about the mean over tasks.
    """

    label: str
    change: tuple[float, float, float]
    result: RowResult
    margin: float = 0.0
    is_mean: bool = False


@dataclass(frozen=True)
class ForestGroup:
    """Differences below one title.

    Args:
        title: text of the claim, or the two systems.
        note: verdict and what is subtracted.
        result: outcome of the claim, for the colour of the note; "open" without one.
        rows: the differences.
    """

    title: str
    note: str
    result: ConditionResult
    rows: Sequence[ForestRow]


class SystemPoint(NamedTuple):
    """Mean score of a system, in points, and its cost.

    Args:
        label: label of the system.
        flops: operations of one example, mean over tasks.
        score: value, low and high.
    """

    label: str
    flops: float
    score: tuple[float, float, float]


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
        pairs = list(dict.fromkeys((each["system"], each["against"]) for each in tested))
        if not tested:
            continue
        rows = []
        for each in tested:
            name = each["task"].replace("_", " ")
            # Several pairs in one claim: the task alone does not identify the row.
            label = name if len(pairs) == 1 else f"{name}, {each['system']} − {each['against']}"
            change = tuple(_number(each[key]) for key in ("difference", "low", "high"))
            is_mean = each["task"] == MEAN
            rows.append(ForestRow(label, change, each["result"], each["margin"], is_mean))  # type: ignore[arg-type]
        subtracted = ", ".join(f"{system} − {against}" for system, against in pairs)
        reason = f" ({claim['undecided_reason']})" if claim["undecided_reason"] else ""
        note = f"{claim['verdict']}: {subtracted}{reason}"
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
        change = tuple(_number(row[key]) for key in ("difference", "low", "high"))
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
        value, low, high = (100 * _number(row.get(key)) for key in ("value", "low", "high"))
        # The simple references have no operations.
        flops = _number(row.get("flops_per_example"))
        if flops > 0:
            points.append(SystemPoint(row["system"], flops, (value, low, high)))
    # Colours follow the order, which is that of the tables.
    return sorted(points, key=lambda point: -point.score[0])


def _number(value: Any) -> float:
    # A cell of a CSV file is empty where a number is unknown, JSON has null.
    return float("nan") if value in (None, "") else float(value)
