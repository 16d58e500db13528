"""Plan of a batch prediction: the input as blocks of rows that do not depend on each other.

A block is a range of lines of a ``.jsonl`` file, or a group of media files. The same input gives
the same blocks, so a prediction that was interrupted continues with the blocks that are missing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipelines.data.io.directory import iter_lines
from pipelines.data.io.source_file import open_stream
from skillnet_platform.config import digest_config
from skillnet_platform.errors import UserError
from skillnet_platform.storage import directories
from skillnet_platform.storage.location import Location, join_location

ROW_SUFFIXES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class PredictionBlock:
    """Rows that one worker predicts and commits together.

    Args:
        index: position of the block, from 0.
        source: path or URI of the ``.jsonl`` file; "" for media files.
        start: offset of the first line, in bytes; the line may be empty.
        line: number of this line, from 1.
        rows: number of rows.
        files: paths or URIs of media files.
    """

    index: int
    source: str = ""
    start: int = 0
    line: int = 1
    rows: int = 0
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class BlockPlan:
    """All blocks of an input.

    Args:
        blocks: in the order of the input.
        digest: SHA-256 of names, sizes and blocks of the input; the bytes of a block are hashed
            when it is predicted.
    """

    blocks: list[PredictionBlock]
    digest: str


def plan_blocks(where: Location, block_rows: int) -> BlockPlan:
    """Return the blocks of a file or folder; ``.jsonl`` files are read once to find their lines.

    Args:
        where: a ``.jsonl`` file, or a folder of ``.jsonl`` or media files.
        block_rows: rows of a block at most.

    Raises:
        UserError: there is no file, or a file cannot be read.
    """
    listed = _list_input(where)
    blocks: list[PredictionBlock] = []
    media: list[str] = []
    for name, _ in listed:
        if name.lower().endswith(ROW_SUFFIXES):
            blocks += _cut_lines(name, block_rows)
        else:
            media.append(name)
    for first in range(0, len(media), block_rows):
        group = tuple(media[first : first + block_rows])
        blocks.append(PredictionBlock(0, rows=len(group), files=group))
    if not blocks:
        raise UserError(f"{where}: no rows")
    numbered = [
        PredictionBlock(index, each.source, each.start, each.line, each.rows, each.files)
        for index, each in enumerate(blocks)
    ]
    return BlockPlan(numbered, digest_config([listed, [(b.start, b.rows) for b in numbered]]))


def _list_input(where: Location) -> list[tuple[str, int]]:
    """Return paths or URIs with sizes, sorted; hidden files are left out."""
    if isinstance(where, Path):
        if where.is_file():
            return [(str(where), where.stat().st_size)]
        if not where.is_dir():
            raise UserError(f"{where}: no such file or folder")
        found = [(str(p), p.stat().st_size) for p in where.rglob("*") if p.is_file()]
        kept = [each for each in found if not _is_hidden(Path(each[0]).relative_to(where).parts)]
    elif where.lower().endswith(ROW_SUFFIXES):
        with open_stream(where) as stream:
            kept = [(where, stream.seek(0, 2))]
    else:
        kept = [
            (str(join_location(where, entry.name)), entry.bytes)
            for entry in directories.list_files(where)
            if not _is_hidden(tuple(entry.name.split("/")))
        ]
    if not kept:
        raise UserError(f"{where}: no files")
    return sorted(kept)


def _is_hidden(parts: tuple[str, ...]) -> bool:
    return any(part.startswith((".", "_")) for part in parts)


def _cut_lines(name: str, block_rows: int) -> Iterator[PredictionBlock]:
    """Yield the blocks of a ``.jsonl`` file."""
    try:
        with open_stream(name) as stream:
            start, first, rows = 0, 1, 0
            for number, _ in iter_lines(stream):
                rows += 1
                if rows == block_rows:
                    yield PredictionBlock(0, name, start, first, rows)
                    # The stream is buffered, and its position is that of the next line.
                    start, first, rows = stream.tell(), number + 1, 0
            if rows:
                yield PredictionBlock(0, name, start, first, rows)
    except FileNotFoundError:
        raise UserError(f"{name}: no such file") from None
