"""Rows of one media file joined to one item with several captions.

Many corpora have a row per caption. If every row were an item, a query would have several identical
candidates, and ranks would mean nothing. :func:`join_captions` yields the first row of each item
with all of its captions; the other rows are counted as ``JOINED_ROW``.

Rows of an item need not be adjacent. A first pass over the rows collects the captions of items that
occur again later, in a file. So memory does not grow with the corpus.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain

from pipelines.data.corpora.base import JOINED_ROW, RejectedRow, Row, measure_texts
from pipelines.data.corpora.readers.row_builders import MAX_CAPTIONS, error_row, hash_caption_group
from pipelines.data.io.key_set import KeySet, ScratchDatabase, digest_key

#: Adjacent rows of one item that are in memory at once.
MAX_RUN_ROWS = MAX_CAPTIONS
#: Items of a preview that get the captions of later rows while they are read.
PREVIEW_ITEMS = 1000
#: Field of a row with a value that all rows of the same media file share.
ITEM_FIELD = "item"

RowReader = Callable[[], Iterator[Row | RejectedRow]]


def join_captions(read_rows: RowReader, is_preview: bool) -> Iterator[Row | RejectedRow]:
    """Yield one row per item, with the captions of all rows of its media file.

    Rows of different splits or labels that the corpus gives stay separate items.

    Args:
        read_rows: reads the rows, with the field ``ITEM_FIELD``; is called twice.
        is_preview: omit the first pass. The counts are exact. The list of captions of a yielded
            row grows while later rows are read, for the first ``PREVIEW_ITEMS`` items.
    """
    with LaterCaptions() as later, KeySet() as seen:
        growing: dict[str, list[str]] = {}
        if not is_preview:
            later.collect(read_rows())
        for run in _iter_runs(read_rows()):
            if isinstance(run, RejectedRow):
                yield run
                continue
            item = _identify_item(run[0])
            is_first = seen.add(item)
            if is_first:
                first = _join_run(run, later.captions(item))
                is_shown = is_preview and len(growing) < PREVIEW_ITEMS
                if is_shown and not isinstance(first, RejectedRow):
                    growing[item] = first["captions"]
                yield first
            elif item in growing:
                growing[item][:] = _list_captions(run, before=growing[item])[:MAX_CAPTIONS]
            for row in run[1:] if is_first else run:
                yield RejectedRow(row["key"], JOINED_ROW, row.get("file"), row.get("row"))


class LaterCaptions(ScratchDatabase):
    """Captions of rows whose item occurred before, but not in the row before, in a file."""

    def __init__(self) -> None:
        super().__init__("CREATE TABLE later (item BLOB, caption TEXT)")

    def collect(self, rows: Iterator[Row | RejectedRow]) -> None:
        """Keep the captions of all rows after the first run of an item."""
        with KeySet() as seen:
            for run in _iter_runs(rows):
                if isinstance(run, RejectedRow) or seen.add(item := _identify_item(run[0])):
                    continue
                number = digest_key(item)
                texts = ((number, caption) for row in run for caption in row["captions"])
                if self.database is None:
                    self.open().execute("BEGIN")
                self.open().executemany("INSERT INTO later VALUES (?, ?)", texts)
        if self.database is not None:
            self.database.execute("COMMIT")
            self.database.execute("CREATE INDEX items ON later (item)")

    def captions(self, item: str) -> list[str]:
        """Return the captions of an item in the order of their rows, one more than allowed."""
        if self.database is None:
            return []
        query = "SELECT caption FROM later WHERE item = ? ORDER BY rowid LIMIT ?"
        found = self.database.execute(query, (digest_key(item), MAX_CAPTIONS + 1))
        return [caption for (caption,) in found]


def _iter_runs(rows: Iterator[Row | RejectedRow]) -> Iterator[list[Row] | RejectedRow]:
    """Yield adjacent rows of one item together, up to ``MAX_RUN_ROWS``."""
    run: list[Row] = []
    for row in rows:
        # Captions of the same media file in other rows are kept.
        if not isinstance(row, RejectedRow) and (reason := measure_texts(row)[1]):
            row = error_row(row["key"], reason, row.get("file"), row.get("row"))
        if isinstance(row, RejectedRow):
            if run:
                yield run
            yield row
            run = []
            continue
        is_same = run and _identify_item(run[0]) == _identify_item(row)
        if run and not (is_same and len(run) < MAX_RUN_ROWS):
            yield run
            run = []
        run.append(row)
    if run:
        yield run


def _identify_item(row: Row) -> str:
    # An item of the test is never joined to one of the training rows, even if the file is the same.
    return "\x1f".join((row["split"], row["label"] or "", row[ITEM_FIELD]))


def _join_run(run: list[Row], later: list[str]) -> Row | RejectedRow:
    first = {name: value for name, value in run[0].items() if name != ITEM_FIELD}
    captions = _list_captions(run, later=later)
    if len(captions) > MAX_CAPTIONS:
        reason = f"more than {MAX_CAPTIONS} captions"
        return error_row(first["key"], reason, first.get("file"), first.get("row"))
    return first | {"captions": captions, "group": hash_caption_group(captions)}


def _list_captions(
    run: list[Row], *, before: Sequence[str] = (), later: Sequence[str] = ()
) -> list[str]:
    """Return the distinct captions of some rows, between others of the same item."""
    return list(dict.fromkeys(chain(before, (c for row in run for c in row["captions"]), later)))
