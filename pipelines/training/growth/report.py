"""Reports of a growth and of a merge: whether the old parts are unchanged.

Old parts of a growth count as unchanged if three comparisons hold: the bytes of every old file
(sha256), every metric of every old task on every test row, and the files with optimizer state. The
report also compares the new task with reference runs. A merge compares the outputs of every task to
the bit. ``skillnet grow`` and ``skillnet merge`` print, write and log their reports.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from pipelines.training.evaluation import tables as evaluation_tables
from skillnet_evidence.cells import markdown_table
from skillnet_platform import console
from skillnet_platform.storage import atomic_write, write_json

if TYPE_CHECKING:
    from skillnet_platform.tracking import Tracker

REPORT_JSON = "growth.json"
#: System name of the grown model; reference runs have their own names.
GROWN = "grown"

#: System -> its label in tables.
TRAINING_LABELS = {
    GROWN: "new skill and head",
    "without_skill": "head on the frozen model",
    "fresh": "fresh model, this task alone",
    "everything": "everything trained further",
}


#: Title, columns and cells of a table.
ReportTable = tuple[str, list[str], list[list[str]]]
ReportT = TypeVar("ReportT", bound="ChangeReport")


class ChangeReport:
    """Findings of a command that makes a model from trained ones: a sentence, tables and files."""

    #: Name of the files, of the folder of artifacts, and prefix of the tag.
    kind: ClassVar[str]
    #: Properties that the JSON file has too; the first one is the tag of the run.
    derived: ClassVar[tuple[str, ...]]
    #: Field with a list -> class of its entries.
    entries: ClassVar[Mapping[str, Any]]

    def summarize(self) -> str:
        """Return one sentence for the terminal and for the page of a registered version."""
        raise NotImplementedError

    def build_tables(self) -> list[ReportTable]:
        """Return the tables of the terminal and of the Markdown file."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, including derived values for readers of the JSON file."""
        # asdict leaves out properties.
        return asdict(self) | {name: getattr(self, name) for name in self.derived}  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls: type[ReportT], values: Mapping[str, Any]) -> ReportT:
        """Return the report of :meth:`to_dict`.

        Args:
            values: content of the JSON file.
        """
        # Derived values are computed again, so that they cannot contradict the entries.
        found = _select_fields(cls, values)
        for name, entry in cls.entries.items():
            found[name] = [entry(**_select_fields(entry, each)) for each in values[name]]
        return cls(**found)

    def to_markdown(self) -> str:
        """Return the report as Markdown."""
        parts = [f"{self.summarize()}."]
        for title, columns, cells in self.build_tables():
            parts += [f"#### {title}", markdown_table(columns, cells)]
        return "\n\n".join(parts)

    def record(self, run: Path, tracker: "Tracker") -> None:
        """Write ``<kind>.json`` and ``<kind>.md``, and log them to the MLflow run.

        Args:
            run: folder of the run.
            tracker: client of the run's MLflow run.
        """
        # Local files come first, because the tracking server may be away.
        json_file, markdown_file = run / f"{self.kind}.json", run / f"{self.kind}.md"
        write_json(json_file, console.to_json_types(self.to_dict()))
        with atomic_write(markdown_file, "w") as stream:
            stream.write(self.to_markdown() + "\n")
        for path in (json_file, markdown_file):
            tracker.artifact(path, self.kind)
        tracker.note(self.to_markdown())
        verdict = self.derived[0]
        tracker.tags({f"{self.kind}.{verdict}": str(getattr(self, verdict)).lower()})

    @classmethod
    def show(cls, result: Mapping[str, Any]) -> None:
        """Print the tables of the report of a result, and the location of the model.

        Args:
            result: result of the command.
        """
        report = cls.from_dict(result[cls.kind])
        for title, columns, cells in report.build_tables():
            console.print_table(title, columns, cells)
        console.print_note(report.summarize())
        console.print_note(f"the model is in {result['model']}")
        if made := result.get("registered"):
            console.print_note(f"{made['uri']} is now @{made['alias']}")


def _select_fields(cls: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    return {each.name: values[each.name] for each in fields(cls) if each.name in values}


def _metric_cells(task: "TaskState | TaskComparison") -> list[str]:
    values = (evaluation_tables.format_metric(task.metric, x) for x in (task.before, task.after))
    return [evaluation_tables.metric_label(task.metric), *values]


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
class GrowthReport(ChangeReport):
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
        rank: columns of the new skill if it is a low-rank difference; 0 for whole matrices.
        chosen: old task -> metric that it chose to be ranked by, in place of the primary one.
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
    rank: int = 0
    chosen: Mapping[str, str] = field(default_factory=dict)

    kind = "growth"
    derived = ("is_unchanged",)
    entries: ClassVar[Mapping[str, Any]] = {
        "files": FileState,
        "tasks": TaskState,
        "transfer_results": TransferResult,
    }

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
        """Return plain values, including the state of each file."""
        values = super().to_dict()
        for entry, file in zip(values["files"], self.files, strict=True):
            entry["state"] = file.state
        return values

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

    def build_tables(self) -> list[ReportTable]:
        """Return (title, columns, cells) of each table of the report."""
        primary = evaluation_tables.PRIMARY_METRICS
        old_tasks = [
            task
            for task in self.tasks
            if task.metric in ([self.chosen[task.task]] if task.task in self.chosen else primary)
        ]
        added = "skill" if self.skill else "head"
        if self.rank:
            added += f" of rank {self.rank}"
        tables = [
            (
                f"{self.task}: benefit of the new {added}",
                ["trained", "split", "metric", "grown minus this", "parameters", "training"],
                [_transfer_cells(result) for result in self.transfer_results],
            ),
            (
                "old tasks",
                ["task", "split", "metric", "before", "after", ""],
                [
                    [
                        task.task,
                        task.split,
                        *_metric_cells(task),
                        "same" if task.is_unchanged else "CHANGED",
                    ]
                    for task in old_tasks
                ],
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
        """Return the report as Markdown, with the numbers of the comparisons."""
        return f"{super().to_markdown()}\n\n" + (
            f"{self.steps} steps, seed {self.seed}. All {len(self.tasks)} metrics of the old tasks "
            f"were compared, with their intervals and costs, and the outcomes of "
            f"{self.rows_compared} test rows ({self.rows_changed} changed). The optimizer kept "
            f"state only for {', '.join(self.optimizer_files) or 'no file'}."
        )


def _transfer_cells(result: TransferResult) -> list[str]:
    value = evaluation_tables.format_value_with_interval(asdict(result))
    return [
        TRAINING_LABELS.get(result.system, result.system),
        result.split,
        f"{evaluation_tables.metric_label(result.metric)} {value}",
        _format_difference(result),
        f"{result.trained_params:,}",
        console.format_minutes(result.seconds),
    ]


def _short(digest: str | None) -> str:
    # 16 digits identify a file in a table; the JSON file has all of them.
    return "–" if digest is None else digest[:16]


def _format_difference(result: TransferResult) -> str:
    if not result.difference:
        return "–"
    value, low, high = (100 * x for x in result.difference)
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f}) points"


@dataclass(frozen=True)
class MergedFile:
    """A file of the merged model.

    Args:
        file: its name.
        origins: models that have it.
        sha256: in the merged model.
        is_averaged: whether it is an average and no copy.
    """

    file: str
    origins: list[str]
    sha256: str
    is_averaged: bool


@dataclass(frozen=True)
class TaskComparison:
    """A task of one model, on one split, before and after the merge.

    Args:
        model: name of the model.
        task: name of the task in the merged model.
        split: split of its corpus, such as ``test``.
        rows: number of rows in the split.
        is_identical: whether all outputs of all rows are equal to the bit.
        metric: the one that ranks models of the task.
        before: its value in the model.
        after: its value in the merged model.
    """

    model: str
    task: str
    split: str
    rows: int
    is_identical: bool
    metric: str
    before: float
    after: float


@dataclass(frozen=True)
class MergeReport(ChangeReport):
    """Report of one merge.

    Args:
        parents: name -> digest of the weights of each model.
        total_params: parameters of the merged model.
        files: origin and digest of each file.
        tasks: comparisons of outputs of all models.
    """

    parents: dict[str, str]
    total_params: int
    files: list[MergedFile]
    tasks: list[TaskComparison]

    kind = "merge"
    derived = ("is_identical", "is_exact")
    entries: ClassVar[Mapping[str, Any]] = {"files": MergedFile, "tasks": TaskComparison}

    @property
    def is_identical(self) -> bool:
        """Whether every output of every task is equal to the bit."""
        return all(task.is_identical for task in self.tasks)

    @property
    def is_exact(self) -> bool:
        """Whether every file is a copy of a file of one of the models."""
        return not any(file.is_averaged for file in self.files)

    def summarize(self) -> str:
        """Return one sentence for the terminal and for the page of a registered version."""
        names = ", ".join(self.parents)
        rows = sum(task.rows for task in self.tasks)
        if self.is_identical:
            return (
                f"merged from {names}: the outputs of all {len(self.tasks)} tasks and splits are "
                f"identical to the bit on {rows:,} test rows"
            )
        changed = [task for task in self.tasks if not task.is_identical]
        worst = max(changed, key=_loss)
        averaged = sum(file.is_averaged for file in self.files)
        return (
            f"merged from {names} by averaging {averaged} files, so the join is not exact: "
            f"{len(changed)} of {len(self.tasks)} tasks and splits have other outputs; most lost "
            f"{worst.task} of {worst.model}: {evaluation_tables.metric_label(worst.metric)} "
            f"{evaluation_tables.format_metric(worst.metric, worst.before)} before, "
            f"{evaluation_tables.format_metric(worst.metric, worst.after)} after"
        )

    def build_tables(self) -> list[ReportTable]:
        """Return (title, columns, cells) of each table of the report."""
        return [
            (
                "tasks",
                ["model", "task", "split", "rows", "metric", "before", "after", "outputs"],
                [
                    [
                        task.model,
                        task.task,
                        task.split,
                        f"{task.rows:,}",
                        *_metric_cells(task),
                        "identical" if task.is_identical else "CHANGED",
                    ]
                    for task in self.tasks
                ],
            ),
            (
                "files",
                ["file", "from", "sha256"],
                [
                    [
                        file.file,
                        ("average of " if file.is_averaged else "") + ", ".join(file.origins),
                        file.sha256[:16],
                    ]
                    for file in self.files
                ],
            ),
        ]


def _loss(task: TaskComparison) -> float:
    """Return by how much a task became worse."""
    is_better = evaluation_tables.find_metric(task.metric).higher_is_better
    return task.before - task.after if is_better else task.after - task.before
