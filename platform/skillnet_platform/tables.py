"""Tables on the terminal and in CSV files.

Commands print a :class:`skillnet_evidence.cells.ReportTable` or call
:func:`skillnet_platform.console.print_table`. The files of a run have the tables of
:func:`write_csv`.
"""

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import IO, Any

from skillnet_evidence.cells import ReportTable
from skillnet_platform import console
from skillnet_platform.storage import atomic_write


def show_table(table: ReportTable, heading: str = "") -> None:
    """Print a table, with a heading before its title."""
    lines = [[cell.to_lines() for cell in row] for row in table.rows]
    console.print_table(f"{heading}{table.title}", table.columns, lines, table.caption)


def write_csv(
    path: str | os.PathLike[str],
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str] | None = None,
    digits: str = ".6g",
    open_file: Callable[..., AbstractContextManager[IO[Any]]] = atomic_write,
) -> None:
    """Write rows as CSV; missing values and NaN are empty cells.

    Args:
        path: place of the file.
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
