"""Tables of texts for every output: the terminal, Markdown, HTML and CSV.

Commands print :class:`ReportTable` or call :func:`skillnet_platform.console.print_table`. Pages
show the same object by a template. The files of a run have the tables of :func:`write_csv`.
"""

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import IO, Any

from skillnet_platform import console
from skillnet_platform.storage import atomic_write
from skillnet_platform.terminal_text import NO_BREAK_SPACE


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
    """Table with a title and a caption.

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

    def show(self, heading: str = "") -> None:
        """Print the table, with a heading before its title."""
        lines = [[cell.to_lines() for cell in row] for row in self.rows]
        console.print_table(f"{heading}{self.title}", self.columns, lines, self.caption)

    def to_markdown(self) -> str:
        """Return the table with its title and caption as Markdown."""
        lines = [[cell.to_line() for cell in row] for row in self.rows]
        parts = [f"#### {self.title}", markdown_table(self.columns, lines), self.caption]
        return "\n\n".join(part for part in parts if part)


def markdown_table(columns: Sequence[str], cells: Sequence[Sequence[str]], numeric: int = 0) -> str:
    """Return a Markdown table.

    Args:
        columns: titles.
        cells: lines of cells; pipe characters are escaped.
        numeric: number of the last columns that are right-aligned.
    """
    marks = ["---"] * (len(columns) - numeric) + ["---:"] * numeric
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |"
        for line in (columns, marks, *cells)
    )


def write_csv(
    path: str | os.PathLike[str],
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str] | None = None,
    digits: str = ".6g",
    open_file: Callable[..., AbstractContextManager[IO[Any]]] = atomic_write,
) -> None:
    """Write rows as CSV; missing values and NaN are empty cells.

    Args:
        path: of the file.
        rows: column -> value.
        columns: to write; by default all in the order of the rows.
        digits: format of floating-point numbers; "" for all their digits.
        open_file: opens the path for writing; ``open_output`` for a path that the user named.
    """
    known = list(columns or dict.fromkeys(key for row in rows for key in row))
    with open_file(path, "w") as stream:
        # The csv module writes CRLF by default; the other text files of a run have LF.
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(known)
        writer.writerows([_csv_cell(row.get(key), digits) for key in known] for row in rows)


def _csv_cell(value: Any, digits: str) -> Any:
    # NaN, the only value that differs from itself, stands for a bound that was not computed.
    if value is None or value != value:
        return ""
    return format(value, digits) if isinstance(value, float) and digits else value
