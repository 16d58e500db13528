"""Rows of an opened corpus by split, and the bytes of their media."""

from collections import Counter, defaultdict
from typing import Any

from pipelines.data.corpora import ExternalCorpus
from pipelines.data.corpora.base import RejectedRow, SourceArchives
from pipelines.data.io.media import MediaReadError, read_media

Rows = dict[str, list[dict[str, Any]]]


def read(corpus: ExternalCorpus) -> tuple[Rows, Counter[str]]:
    """Return (split -> rows, reason -> number of rejected rows); check that keys are unique."""
    rows: Rows = defaultdict(list)
    reasons: Counter[str] = Counter()
    keys = []
    for row in corpus.rows(SourceArchives.none()):
        if isinstance(row, RejectedRow):
            reasons[row.reason] += 1
            keys.append(row.key)
        else:
            rows[row["split"]].append(row)
            keys.append(row["key"])
    assert len(set(keys)) == len(keys)
    return dict(rows), reasons


def sizes(rows: Rows) -> dict[str, int]:
    """Return split -> number of rows."""
    return {split: len(each) for split, each in sorted(rows.items())}


def media(row: dict[str, Any]) -> bytes:
    """Return the bytes that a row refers to."""
    (found,) = read_media([row["media"]])
    assert not isinstance(found, MediaReadError), found
    return found
