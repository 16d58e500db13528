"""Tables of scores: CSV and Parquet files."""

import csv
from collections.abc import Sequence
from pathlib import Path

from skillnet_evidence.errors import EvidenceError, require_known
from skillnet_evidence.readers.lines import ReadOptions, ScoreLines, forbid_options, list_files


def read_tables(sources: Sequence[str], options: ReadOptions) -> ScoreLines:
    """Return the lines of CSV or Parquet files with equal columns."""
    forbid_options(options, "a table", metrics="has a column metric", unit="has a column unit")
    forbid_options(options, "a table", system="has a column system")
    columns: list[str] = []
    rows: list[Sequence[str]] = []
    places: list[str] = []
    for path, _ in list_files(sources, ".csv", ".parquet"):
        name = path.suffix[1:] if path.suffix in (".csv", ".parquet") else options.file_format
        try:
            header, lines, numbers = _read_parquet(path) if name == "parquet" else _read_csv(path)
        except (csv.Error, ValueError) as error:
            if isinstance(error, EvidenceError):
                raise
            reason = str(error).partition("\n")[0]
            raise EvidenceError(f"{path}: not a file of scores ({reason})") from None
        if columns and header != columns:
            raise EvidenceError(f"{path}: other columns than {sources[0]}; give files of one kind")
        columns = header
        rows += lines
        places += [f"{path}, {number}" for number in numbers]
    if options.tasks and "task" in columns:
        index = columns.index("task")
        require_known(
            options.tasks, [row[index] for row in rows if len(row) > index], "--tasks", "task"
        )
        kept = [n for n, row in enumerate(rows) if len(row) <= index or row[index] in options.tasks]
        rows, places = [rows[n] for n in kept], [places[n] for n in kept]
    return ScoreLines("", "", columns, rows, places)


def _read_csv(path: Path) -> tuple[list[str], list[list[str]], list[str]]:
    # Spreadsheets begin UTF-8 with a mark.
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, strict=True)
        header = [name.strip() for name in next(reader, [])]
        rows, places = [], []
        for row in reader:
            if row:
                rows.append(row)
                places.append(f"line {reader.line_num}")
    return header, rows, places


def _read_parquet(path: Path) -> tuple[list[str], list[tuple[str, ...]], list[str]]:
    try:
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        raise EvidenceError(
            f"{path}: Parquet needs pyarrow; in a clone, pip install './plugins/evidence[parquet]'"
        ) from None
    table = pq.read_table(path)
    values = [
        ["" if value is None else str(value) for value in column.to_pylist()]
        for column in table.columns
    ]
    places = [f"row {number + 1}" for number in range(table.num_rows)]
    return table.column_names, list(zip(*values, strict=True)), places
