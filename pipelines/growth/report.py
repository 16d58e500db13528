"""What growing a model left untouched, and what the new skill is worth, as a report.

Untouched means three things, each compared with what was there before: the bytes of every old
file (sha256), every figure of every old task on every test row, and the files that the optimiser
kept state for.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pipelines.evaluation import tables as evaluation_tables

REPORT_JSON = "growth.json"
REPORT_MARKDOWN = "growth.md"
GROWN = "grown"

TRAINING_LABELS = {
    GROWN: "new skill and head",
    "without_skill": "head on the frozen model",
    "fresh": "fresh model, this task alone",
    "everything": "everything trained further",
}


@dataclass(frozen=True)
class FileState:
    """A file of weights and its sha256 before and after; None where there is none."""

    file: str
    before: str | None
    after: str | None

    @property
    def state(self) -> str:
        """same, new, changed or gone."""
        if self.before is None:
            return "new"
        if self.after is None:
            return "gone"
        return "same" if self.before == self.after else "changed"


@dataclass(frozen=True)
class TaskState:
    """An old task's figure before and after; ``same`` holds for its interval and costs too."""

    task: str
    split: str
    metric: str
    before: float
    after: float
    same: bool


@dataclass(frozen=True)
class TransferResult:
    """What one way to learn the new task came to, on one split.

    Args:
        system: ``grown`` or a reference.
        split: of the corpus.
        metric: the task's headline.
        value, low, high: with its interval over test rows.
        behind: metric of ``grown`` less this one on the same rows, with its paired interval.
        trained: parameters that its steps changed.
        seconds: of training.
        lost: old task -> (headline before, after) on ``test``, where it was measured after.
    """

    system: str
    split: str
    metric: str
    value: float
    low: float
    high: float
    behind: list[float]
    trained: int
    seconds: float
    lost: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class GrowthReport:
    """The report of one growth; see the head of this file."""

    source: str
    source_digest: str
    skill: str
    task: str
    corpus: str
    objective: str
    steps: int
    seed: int
    total_parameters: int
    files: list[FileState]
    tasks: list[TaskState]
    rows_compared: int
    rows_differing: int
    optimiser: list[str]
    worth: list[TransferResult]

    @property
    def untouched(self) -> bool:
        """Whether only new files differ and everything of the old tasks is the same."""
        new = {each.file for each in self.files if each.state == "new"}
        return (
            all(each.state in ("same", "new") for each in self.files)
            and all(each.same for each in self.tasks)
            and not self.rows_differing
            and set(self.optimiser) <= new
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with what follows from them said once more for readers of the JSON."""
        values: dict[str, Any] = asdict(self)
        for entry, file in zip(values["files"], self.files, strict=True):
            entry["state"] = file.state
        return values | {"untouched": self.untouched}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "GrowthReport":
        """The inverse of :meth:`to_dict`."""
        rest = {k: v for k, v in values.items() if k not in ("files", "tasks", "worth")}
        rest.pop("untouched", None)
        files = [FileState(f["file"], f["before"], f["after"]) for f in values["files"]]
        tasks = [TaskState(**each) for each in values["tasks"]]
        worth = [TransferResult(**each) for each in values["worth"]]
        return cls(**rest, files=files, tasks=tasks, worth=worth)

    def headline(self) -> str:
        """One sentence, for the terminal and for the page of a registered version."""
        same = sum(each.state == "same" for each in self.files)
        new = [each.file for each in self.files if each.state == "new"]
        own = next((w for w in self.worth if (w.system, w.split) == (GROWN, "test")), None)
        figure = ""
        if own is not None:
            shown = evaluation_tables.format_value_with_interval(asdict(own))
            figure = f": {self.task} {evaluation_tables.metric_label(own.metric)} {shown}"
        kept = "untouched" if self.untouched else "NOT untouched"
        return (
            f"grown from {self.source} by {', '.join(new)}{figure}; {same} old files, "
            f"{len(self.tasks)} figures and {self.rows_compared} rows of old tasks {kept}"
        )

    def tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """(title, columns, cells) of the report's tables."""
        files = [
            [each.file, each.state, _short(each.before), _short(each.after)] for each in self.files
        ]
        headline = {metric for metric, _ in evaluation_tables.OBJECTIVE_METRICS.values()}
        figures = [
            [
                each.task,
                each.split,
                evaluation_tables.metric_label(each.metric),
                evaluation_tables.format_value(each.metric, each.before),
                evaluation_tables.format_value(each.metric, each.after),
                "same" if each.same else "CHANGED",
            ]
            for each in self.tasks
            if each.metric in headline
        ]
        worth = [
            [
                TRAINING_LABELS.get(each.system, each.system),
                each.split,
                f"{evaluation_tables.metric_label(each.metric)} {evaluation_tables.format_value_with_interval(asdict(each))}",
                _difference(each),
                f"{each.trained:,}",
                f"{each.seconds:.0f} s",
            ]
            for each in self.worth
        ]
        tables = [
            (
                f"{self.task}: what the new skill is worth",
                ["trained", "split", "figure", "grown less this", "parameters", "training"],
                worth,
            ),
            ("old tasks", ["task", "split", "figure", "before", "after", ""], figures),
            ("files", ["file", "", "sha256 before", "after"], files),
        ]
        metric_of = {each.task: each.metric for each in self.tasks if each.metric in headline}
        lost = [
            [
                task,
                evaluation_tables.metric_label(metric_of[task]),
                *(evaluation_tables.format_value("", x) for x in pair),
            ]
            for each in self.worth
            if (each.system, each.split) == ("everything", "test")
            for task, pair in each.lost.items()
        ]
        if lost:
            title = f"old tasks after {TRAINING_LABELS['everything']}"
            tables.insert(2, (title, ["task", "figure", "before", "after"], lost))
        return tables

    def markdown(self) -> str:
        """The report as markdown."""
        parts = [f"{self.headline()}."]
        for title, columns, cells in self.tables():
            parts += [f"#### {title}", evaluation_tables.markdown_table(columns, cells)]
        parts += [
            f"{self.steps} steps, seed {self.seed}. Of each old task every figure of the CSV "
            f"files, its interval and its cost were compared ({len(self.tasks)} figures), and what "
            f"became of each of {self.rows_compared} test rows ({self.rows_differing} differ). The "
            f"optimiser kept state for {', '.join(self.optimiser) or 'nothing'} only."
        ]
        return "\n\n".join(parts)


def _short(digest: str | None) -> str:
    return "–" if digest is None else digest[:16]


def _difference(each: TransferResult) -> str:
    if not each.behind:
        return "–"
    value, low, high = (100 * x for x in each.behind)
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f}) points"
