"""CSV files that commands only add rows to, so that an interrupted command resumes."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path


def read_csv_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV; none if it does not exist.

    Args:
        path: of the CSV.
    """
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def append_csv_rows(
    path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, object]]
) -> None:
    """Append rows to a CSV, with a header if it is new.

    Args:
        path: of the CSV; its folder is created.
        columns: of the CSV, in order.
        rows: with a value for each column.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.is_file()
    with path.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)
