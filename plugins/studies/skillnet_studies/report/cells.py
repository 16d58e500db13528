"""Cells and tables of a report, as plain texts.

:mod:`skillnet_studies.report.tables` and its neighbours build them; the terminal, the page and
MLflow show them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from pipelines.training.evaluation.tables import metric_label
from skillnet_platform.terminal_text import NO_BREAK_SPACE
from skillnet_studies.analysis.comparison import SystemComparison


@dataclass(frozen=True)
class TableCell:
    """One cell of a table.

    Args:
        text: the value.
        small: its interval, shown below the value.
        mark: mark of a significant difference.
        is_best: whether the value is the best of its column.
        is_prose: whether the text is a sentence, which the page wraps.
    """

    text: str
    small: str = ""
    mark: str = ""
    is_best: bool = False
    is_prose: bool = False

    def to_lines(self) -> str:
        """Return the cell with the interval on a second line, which keeps columns narrow."""
        # An interval is one word for the layout: a line must not end within it.
        small = self.small.replace(" ", NO_BREAK_SPACE)
        return f"{self.text}{self.mark}" + (f"\n{small}" if small else "")

    def to_line(self) -> str:
        """Return the cell as one line of plain text."""
        interval = f" ({self.small})" if self.small else ""
        return f"{self.text}{self.mark}{interval}"


@dataclass(frozen=True)
class ReportTable:
    """A table of the report.

    Args:
        title: title of the table.
        columns: column names; the first column names the row.
        rows: cells of each row.
        caption: text below the table.
        collapsed: omit the table on the terminal and in MLflow. The page folds all tables but one.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[TableCell]]
    caption: str = ""
    collapsed: bool = field(default=False, kw_only=True)


def name_score(comparison: SystemComparison, task: str) -> str:
    """Return the name of a task's score, of which a higher one is better.

    Args:
        comparison: computed results.
        task: name of a task.
    """
    metric = comparison.metrics[task]
    return "1 − token error" if metric == "token_error_rate" else metric_label(metric)
