"""Facts in a bundle that readers of the model need: licences of its data, and its figures."""

import csv
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

#: Evaluation rows in the folder of a run.
EVALUATION_CSV = "evaluation.csv"
#: Columns of evaluation rows that a bundle keeps.
FIGURE_COLUMNS = ("task", "split", "metric", "value", "low", "high")


def list_licences(corpora: Iterable[str]) -> list[str]:
    """Return ``source: licence`` of the data of built-in corpora; [] for other corpora.

    Args:
        corpora: names of the corpora that rows come from.
    """
    from pipelines.data.corpora import find_corpus, is_built_in

    known = [name for name in corpora if is_built_in(name)]
    archives = [each for name in known for each in find_corpus(name).archives]
    # Two corpora may come from one archive.
    return list(dict.fromkeys(f"{each.requirement}: {each.licence}" for each in archives))


def read_run_figures(run: Path | None) -> list[dict[str, Any]]:
    """Return the evaluation rows of a run's folder; [] if it has none.

    Args:
        run: folder of the run, or None.
    """
    path = run / EVALUATION_CSV if run is not None else None
    if path is None or not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def select_figures(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return evaluation rows with the columns ``FIGURE_COLUMNS``, as plain values.

    Args:
        rows: records of an evaluation, or read from its CSV file.
    """
    figures = []
    for row in rows:
        figure: dict[str, Any] = {key: str(row[key]) for key in FIGURE_COLUMNS[:3]}
        for key in FIGURE_COLUMNS[3:]:
            # An empty cell is a figure without an interval; JSON has no NaN.
            value = float(row[key]) if row.get(key) not in (None, "") else math.nan
            figure[key] = value if math.isfinite(value) else None
        figures.append(figure)
    return figures
