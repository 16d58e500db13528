"""Report of a growth: whether the old parts are unchanged, and the benefit of the new skill.

Old parts count as unchanged if three comparisons hold: the bytes of every old file (sha256), every
metric of every old task on every test row, and the files with optimizer state. The report also
compares the new task with reference runs.
:func:`pipelines.training.growth.verification.build_growth_report` fills a :class:`GrowthReport`;
``skillnet grow`` prints, writes and logs it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pipelines.training.evaluation import tables as evaluation_tables
from skillnet_evidence.cells import markdown_table

REPORT_JSON = "growth.json"
REPORT_MARKDOWN = "growth.md"
#: System name of the grown model; reference runs have their own names.
GROWN = "grown"

#: System -> its label in tables.
TRAINING_LABELS = {
    GROWN: "new skill and head",
    "without_skill": "head on the frozen model",
    "fresh": "fresh model, this task alone",
    "everything": "everything trained further",
}


@dataclass(frozen=True)
class FileState:
    """sha256 of a weight file before and after growth; None if the file does not exist."""

    file: str
    before: str | None
    after: str | None

    @property
    def state(self) -> str:
        """One of same, new, changed and gone."""
        if self.before is None:
            return "new"
        if self.after is None:
            return "gone"
        # Equal hashes mean equal bytes; comparing values would miss a changed dtype.
        return "same" if self.before == self.after else "changed"


@dataclass(frozen=True)
class TaskState:
    """Metric of an old task before and after growth.

    Args:
        task: name of the old task.
        split: name of the split.
        metric: name of the metric.
        before: its value before growth.
        after: its value after growth.
        is_unchanged: whether value, interval and cost are equal.
    """

    task: str
    split: str
    metric: str
    before: float
    after: float
    is_unchanged: bool


@dataclass(frozen=True)
class TransferResult:
    """Result of one way to train the new task, on one split.

    Args:
        system: ``grown`` or the name of a reference run.
        split: split of the corpus, such as ``test``.
        metric: primary metric of the task.
        value: point estimate of the metric.
        low: lower bound of its interval over test rows.
        high: upper bound of its interval.
        difference: value of ``grown`` minus this value on the same rows, with the bounds of its
            paired interval; empty for ``grown``.
        trained_params: parameters that training changed.
        seconds: duration of the training.
        regressions: old task -> (primary metric before, after) on ``test``, if it was measured.
    """

    system: str
    split: str
    metric: str
    value: float
    low: float
    high: float
    difference: list[float]
    trained_params: int
    seconds: float
    regressions: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class GrowthReport:
    """Report of one growth.

    Args:
        source: name of the source model.
        source_digest: SHA-256 of its weights.
        skill: name of the new skill; "" if only a task was added.
        task: name of the new task.
        corpus: name of the prepared rows of the new task.
        objective: kind of the new task.
        steps: training steps.
        seed: start of the random numbers of the run.
        total_params: parameters of the grown model.
        files: weight files, compared.
        tasks: metrics of the old tasks, compared.
        rows_compared: test rows of the old tasks.
        rows_changed: number of these rows whose outcome changed.
        optimizer_files: weight files with optimizer state.
        transfer_results: scores of the new task of the grown model and of the reference runs.
    """

    source: str
    source_digest: str
    skill: str
    task: str
    corpus: str
    objective: str
    steps: int
    seed: int
    total_params: int
    files: list[FileState]
    tasks: list[TaskState]
    rows_compared: int
    rows_changed: int
    optimizer_files: list[str]
    transfer_results: list[TransferResult]

    @property
    def is_unchanged(self) -> bool:
        """Whether only new files differ and all results of the old tasks are equal."""
        new = {file.file for file in self.files if file.state == "new"}
        return (
            all(file.state in ("same", "new") for file in self.files)
            and all(task.is_unchanged for task in self.tasks)
            and not self.rows_changed
            # Optimizer state of an old file would mean that a step could have changed it.
            and set(self.optimizer_files) <= new
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, including derived values for readers of the JSON file."""
        # asdict leaves out properties, which readers of the JSON file need.
        values: dict[str, Any] = asdict(self)
        for entry, file in zip(values["files"], self.files, strict=True):
            entry["state"] = file.state
        return values | {"is_unchanged": self.is_unchanged}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "GrowthReport":
        """Return the report of :meth:`to_dict`.

        Args:
            values: content of the JSON file.
        """
        lists = ("files", "tasks", "transfer_results")
        rest = {key: value for key, value in values.items() if key not in lists}
        # Derived values are computed again, so that they cannot contradict the entries.
        rest.pop("is_unchanged", None)
        files = [FileState(f["file"], f["before"], f["after"]) for f in values["files"]]
        tasks = [TaskState(**entry) for entry in values["tasks"]]
        results = [TransferResult(**entry) for entry in values["transfer_results"]]
        return cls(**rest, files=files, tasks=tasks, transfer_results=results)

    def summarize(self) -> str:
        """Return one sentence for the terminal and for the page of a registered version."""
        unchanged_files = sum(file.state == "same" for file in self.files)
        new = [file.file for file in self.files if file.state == "new"]
        own = next(
            (r for r in self.transfer_results if (r.system, r.split) == (GROWN, "test")), None
        )
        metric = ""
        if own is not None:
            value = evaluation_tables.format_value_with_interval(asdict(own))
            metric = f": {self.task} {evaluation_tables.metric_label(own.metric)} {value}"
        outcome = "unchanged" if self.is_unchanged else "NOT unchanged"
        return (
            f"grown from {self.source} by {', '.join(new)}{metric}; {unchanged_files} old files, "
            f"{len(self.tasks)} metrics and {self.rows_compared} rows of old tasks {outcome}"
        )

    def build_tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """Return (title, columns, cells) of each table of the report."""
        primary = evaluation_tables.PRIMARY_METRICS
        old_tasks = [task for task in self.tasks if task.metric in primary]
        tables = [
            (
                f"{self.task}: benefit of the new {'skill' if self.skill else 'head'}",
                ["trained", "split", "metric", "grown minus this", "parameters", "training"],
                [_transfer_cells(result) for result in self.transfer_results],
            ),
            (
                "old tasks",
                ["task", "split", "metric", "before", "after", ""],
                [_task_cells(task) for task in old_tasks],
            ),
            (
                "files",
                ["file", "", "sha256 before", "after"],
                [[f.file, f.state, _short(f.before), _short(f.after)] for f in self.files],
            ),
        ]
        metric_of = {task.task: task.metric for task in old_tasks}
        regressions = [
            [
                task,
                evaluation_tables.metric_label(metric_of[task]),
                *(evaluation_tables.format_metric("", value) for value in pair),
            ]
            for result in self.transfer_results
            if (result.system, result.split) == ("everything", "test")
            for task, pair in result.regressions.items()
        ]
        if regressions:
            title = f"old tasks after {TRAINING_LABELS['everything']}"
            # Next to the table of the old tasks, because the reader compares both.
            tables.insert(2, (title, ["task", "metric", "before", "after"], regressions))
        return tables

    def to_markdown(self) -> str:
        """Return the report as Markdown."""
        parts = [f"{self.summarize()}."]
        for title, columns, cells in self.build_tables():
            parts += [f"#### {title}", markdown_table(columns, cells)]
        parts += [
            f"{self.steps} steps, seed {self.seed}. All {len(self.tasks)} metrics of the old tasks "
            f"were compared, with their intervals and costs, and the outcomes of "
            f"{self.rows_compared} test rows ({self.rows_changed} changed). The optimizer kept "
            f"state only for {', '.join(self.optimizer_files) or 'no file'}."
        ]
        return "\n\n".join(parts)


def _transfer_cells(result: TransferResult) -> list[str]:
    value = evaluation_tables.format_value_with_interval(asdict(result))
    return [
        TRAINING_LABELS.get(result.system, result.system),
        result.split,
        f"{evaluation_tables.metric_label(result.metric)} {value}",
        _format_difference(result),
        f"{result.trained_params:,}",
        f"{result.seconds:.0f} s",
    ]


def _task_cells(task: TaskState) -> list[str]:
    return [
        task.task,
        task.split,
        evaluation_tables.metric_label(task.metric),
        evaluation_tables.format_metric(task.metric, task.before),
        evaluation_tables.format_metric(task.metric, task.after),
        "same" if task.is_unchanged else "CHANGED",
    ]


def _short(digest: str | None) -> str:
    # 16 digits identify a file in a table; the JSON file has all of them.
    return "–" if digest is None else digest[:16]


def _format_difference(result: TransferResult) -> str:
    if not result.difference:
        return "–"
    value, low, high = (100 * x for x in result.difference)
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f}) points"
