"""Corpora made up for tests of preparation, and their names as entry points.

A process knows the names if :data:`ENTRY_POINTS` is on its path.
"""

import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from pipelines.data.corpora.base import Archive, Corpus, RejectedRow, Row, SourceArchives
from skillnet_corpora.archives import read_archive
from tests.helpers.archive_files import zipped

#: Directory of the package whose entry points name the corpora here.
ENTRY_POINTS = str(Path(__file__).parents[1] / "made_corpora")
#: Milliseconds that a block takes, for tests that interrupt the work.
SLOW = "SKILLNET_TEST_SLOW"
LINES = "\n".join(f"line {n}" for n in range(100))
ARCHIVE = zipped({"made/lines.txt": LINES.encode()})


class Made(Corpus):
    """A hundred lines: every tenth is empty, line 33 cannot be transformed."""

    name = "made"
    modality = "text"
    task = "text_classification"
    archives = (
        Archive(
            "made-1.0-py3-none-any.whl",
            len(ARCHIVE),
            hashlib.sha256(ARCHIVE).hexdigest(),
            "pypi",
            "made==1.0",
            "MIT",
        ),
    )
    raw_schema = pa.schema([("text", pa.string())])
    columns = pa.schema([("text", pa.string()), ("length", pa.int32())])
    omitted_columns: ClassVar = {"test": frozenset({"length"})}
    shard_rows = 8

    def rows(self, sources: SourceArchives) -> Iterator[Row | RejectedRow]:
        """Lines in order; every fifth is for the test."""
        for number, line in enumerate(
            read_archive(sources, "made", "made/lines.txt").decode().split("\n")
        ):
            if number % 10 == 0:
                yield RejectedRow(line, "every tenth")
                continue
            split = "test" if number % 5 == 1 else "train"
            yield {"split": split, "key": line, "group": number, "text": line}

    def transform(self, block: pa.Table, tokenizer: Any) -> pa.Table:
        """The length of each line."""
        time.sleep(float(os.environ.get(SLOW, "0")) / 1000)
        texts = block["text"].to_pylist()
        return pa.table(
            {
                "text": block["text"],
                "length": pa.array([len(text) for text in texts], pa.int32()),
                "rejected": pa.array(
                    ["unlucky" if text.endswith("33") else None for text in texts], pa.string()
                ),
            }
        )

    def preprocessing(self) -> dict[str, Any]:
        """Nothing to choose."""
        return {"every": 10}


class OtherSettings(Made):
    """The same with another number among its settings."""

    def preprocessing(self) -> dict[str, Any]:
        """Another number."""
        return {"every": 11}


class OtherCode(Made):
    """The same after a change of its code."""

    version = 2


class OtherLabels(Made):
    """The same with names for its labels."""

    def facts(self) -> dict[str, Any]:
        """One name."""
        return {"labels": ["line"]}


def put_archive(directory: Path) -> Path:
    """Write the archive of ``Made``; returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / Made.archives[0].file).write_bytes(ARCHIVE)
    return directory


class Few(Made):
    """The same in three shards, for tests that repeat the work often."""

    shard_rows = 40
