"""Report of a merge: the origin of each file, and each task's outputs before and after.

:func:`pipelines.training.growth.merging.build_merge_report` fills a :class:`MergeReport`;
``skillnet merge`` prints, writes and logs it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.training.evaluation import tables as evaluation_tables
from skillnet_evidence.cells import markdown_table


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
        metric: primary metric of the task.
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
class MergeReport:
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

    @property
    def is_identical(self) -> bool:
        """Whether every output of every task is equal to the bit."""
        return all(task.is_identical for task in self.tasks)

    @property
    def is_exact(self) -> bool:
        """Whether every file is a copy of a file of one of the models."""
        return not any(file.is_averaged for file in self.files)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, including derived values for readers of the JSON file."""
        return asdict(self) | {"is_identical": self.is_identical, "is_exact": self.is_exact}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "MergeReport":
        """Return the report of :meth:`to_dict`.

        Args:
            values: content of the JSON file.
        """
        return cls(
            values["parents"],
            values["total_params"],
            [MergedFile(**entry) for entry in values["files"]],
            [TaskComparison(**entry) for entry in values["tasks"]],
        )

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

    def build_tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """Return (title, columns, cells) of each table of the report."""
        return [
            (
                "tasks",
                ["model", "task", "split", "rows", "metric", "before", "after", "outputs"],
                [_task_cells(task) for task in self.tasks],
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

    def to_markdown(self) -> str:
        """Return the report as Markdown."""
        parts = [f"{self.summarize()}."]
        for title, columns, cells in self.build_tables():
            parts += [f"#### {title}", markdown_table(columns, cells)]
        return "\n\n".join(parts)


def _loss(task: TaskComparison) -> float:
    """Return by how much a task became worse."""
    higher_is_better = evaluation_tables.PRIMARY_METRICS[task.metric]
    return task.before - task.after if higher_is_better else task.after - task.before


def _task_cells(task: TaskComparison) -> list[str]:
    return [
        task.model,
        task.task,
        task.split,
        f"{task.rows:,}",
        evaluation_tables.metric_label(task.metric),
        evaluation_tables.format_metric(task.metric, task.before),
        evaluation_tables.format_metric(task.metric, task.after),
        "identical" if task.is_identical else "CHANGED",
    ]
