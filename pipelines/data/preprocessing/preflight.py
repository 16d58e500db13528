"""Checks of a user's corpus before Ray starts: a preparation that must fail fails in seconds.

:func:`check_preparable` reads a small corpus completely, as ``skillnet inspect`` does. A corpus
that is too large for that is checked while it is prepared. ``prepare`` calls it.
"""

import copy
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pipelines.data.corpora import ExternalCorpus
from pipelines.data.corpora.base import RejectedRow, Row, SourceArchives
from pipelines.data.corpora.formats.packed_archives import unpack_hint
from pipelines.data.io.media import MediaReadError, read_media
from pipelines.data.preprocessing.blocks import ReadSummary, RowBlock, read_blocks
from pipelines.data.preprocessing.media_sample import try_media
from pipelines.data.preprocessing.progress import (
    MAX_ADVISED_RATE,
    MOSTLY_BAD_ADVICE,
    check_first_rows,
)
from pipelines.data.preprocessing.time_limit import run_within
from skillnet_platform.errors import UserError
from skillnet_platform.storage import atomic_write

#: Seconds. A corpus that was not read by then is checked while it is prepared.
READ_TIMEOUT_S = 8.0
#: Rows, accepted and rejected. A corpus with more of them is checked while it is prepared.
MAX_FIRST_ROWS = 10_000
#: Media files that are tried until one can be decoded. If half of the files were damaged, all of
#: them would fail once in 65,000 corpora.
MAX_TRIED = 16


def check_preparable(corpus: ExternalCorpus, rejected: Path, max_error_rate: float) -> None:
    """Stop if a corpus cannot be prepared.

    Args:
        corpus: opened, with its labels.
        rejected: file for the rejected rows, written if the check fails.
        max_error_rate: allowed fraction of bad rows.

    Raises:
        UserError: most rows are bad, none is left to train on, or no media file can be decoded.
    """
    with tempfile.TemporaryDirectory(prefix="skillnet-preflight-") as folder:
        lines = Path(folder) / "rejected.jsonl"
        rows, summary = _read_first_rows(corpus, lines)
        if summary is None:
            return
        try:
            check_first_rows(corpus, summary, max_error_rate, rejected)
        except UserError as error:
            with atomic_write(rejected, "w") as stream:
                stream.write(lines.read_text(encoding="utf-8"))
            raise UserError(f"{error}{unpack_hint(corpus.source)}") from None
        if max_error_rate <= MAX_ADVISED_RATE:
            _check_media(corpus, rows)


def _read_first_rows(corpus: ExternalCorpus, lines: Path) -> tuple[list[Row], ReadSummary | None]:
    """Return the rows with media, and the counts of all rows, or None if there are too many."""
    blocks: list[RowBlock] = []
    summaries: list[ReadSummary] = []
    first_rows = copy.copy(corpus)

    def work(is_late: threading.Event) -> None:
        def read(sources: SourceArchives) -> Iterator[Row | RejectedRow]:
            for number, row in enumerate(corpus.rows(sources)):
                # Rejected rows come in no block, so both limits are checked at every row.
                if is_late.is_set() or number >= MAX_FIRST_ROWS:
                    is_late.set()
                    return
                yield row

        first_rows.rows = read  # type: ignore[method-assign]
        for each in read_blocks(first_rows, SourceArchives.none(), lines):
            if isinstance(each, RowBlock):
                blocks.append(each)
            elif not is_late.is_set():
                summaries.append(each)

    run_within(READ_TIMEOUT_S, work)
    if not summaries:
        return [], None
    has_media = "media" in corpus.raw_schema.names
    rows = [row for block in blocks for row in block.table.to_pylist()] if has_media else []
    return rows, summaries[0]


def _check_media(corpus: ExternalCorpus, rows: list[Row]) -> None:
    """Stop if none of some media files, spread evenly over all rows, can be decoded."""
    chosen = rows[:: -(-len(rows) // MAX_TRIED) or 1]
    reasons = Counter[str]()
    for row, data in zip(chosen, read_media([row["media"] for row in chosen]), strict=True):
        reason = data.reason if isinstance(data, MediaReadError) else try_media(corpus, data, row)
        if reason is None:
            return
        reasons[reason] += 1
    if reasons:
        frequent = "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common(5))
        raise UserError(
            f"{corpus.name}: no media file can be decoded; {len(chosen)} of {len(rows)} were "
            f"tried: {frequent}. {MOSTLY_BAD_ADVICE}{unpack_hint(corpus.source)}"
        )
