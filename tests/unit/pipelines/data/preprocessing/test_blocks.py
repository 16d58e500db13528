"""Cutting rows into blocks: numbering, duplicates, wrong types, and resuming."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines.data.corpora.base import MAX_TEXT_LENGTH, RejectedRow, Row, SourceArchives
from pipelines.data.io.key_set import KeySet
from pipelines.data.io.media import MEDIA, MediaRef
from pipelines.data.preprocessing import blocks as blocks_module
from pipelines.data.preprocessing.blocks import (
    DUPLICATE_KEY,
    ReadSummary,
    RowBlock,
    pack_unit,
    read_blocks,
    read_spool_units,
    rejected_rows_path,
    unpack_unit,
    write_spool,
)
from pipelines.data.preprocessing.jobs import CorpusJob, read_units, split_rejected
from pipelines.data.preprocessing.progress import MAX_REASONS, count_reasons
from pipelines.data.preprocessing.staging import REJECTED_ROWS, staging_dir, write_shard_entry
from skillnet_platform.errors import UserError
from tests.helpers.synthetic_corpora import Made, put_archive


class Given(Made):
    """Corpus of given rows."""

    given: tuple[Row | RejectedRow, ...] = ()

    def rows(self, sources: SourceArchives) -> Iterator[Row | RejectedRow]:
        """Yield the given rows."""
        yield from self.given


def row(key: str, **more: Any) -> Row:
    return {"split": "train", "key": key, "group": 1, "text": "x", **more}


def read(
    rows: list[Row | RejectedRow], folder: Path
) -> tuple[list[RowBlock], ReadSummary, list[Any]]:
    corpus = Given()
    corpus.given = tuple(rows)
    *blocks, summary = read_blocks(corpus, SourceArchives(folder, ()), folder / "rejected")
    lines = (folder / "rejected").read_text(encoding="utf-8").splitlines()
    return blocks, summary, [json.loads(line) for line in lines]


def test_all_blocks_but_the_last_of_a_split_are_full(tmp_path: Path) -> None:
    rows = [row(str(n), split="test" if n % 5 == 0 else "train") for n in range(25)]
    blocks, summary, _ = read(rows, tmp_path)
    found = [(b.split, b.shard, b.table.num_rows) for b in blocks]
    assert found == [("train", 0, 8), ("train", 1, 8), ("test", 0, 5), ("train", 2, 4)]
    assert (summary.split_rows, summary.split_shards) == (
        {"test": 5, "train": 20},
        {"test": 1, "train": 3},
    )
    assert len({block.keys for block in blocks}) == 4


def test_long_texts_fill_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few megabytes decompress to thousands of texts of a million characters."""
    monkeypatch.setattr(blocks_module, "MAX_BLOCK_CHARACTERS", 1000)
    rows = [row(str(n), text="长" * (400 if n < 6 else 1)) for n in range(12)]
    blocks, summary, _ = read(rows, tmp_path)
    assert [(b.shard, b.table.num_rows) for b in blocks] == [(0, 3), (1, 3), (2, 6)]
    assert summary.split_shards == {"train": 3}


def test_rejected_rows_are_recorded_with_their_source(tmp_path: Path) -> None:
    rows = [
        row("a", file="list.jsonl", row=1),
        row("a", file="list.jsonl", row=2),
        row("b", file="list.jsonl", row=3, text=["not", "one", "text"]),
        row("c", text="长" * (MAX_TEXT_LENGTH + 1)),
        row("d \udcff"),
        row("e", group="three"),
        RejectedRow("f", "by choice"),
        row("g"),
    ]
    (block,), summary, lines = read(rows, tmp_path)
    assert block.table["key"].to_pylist() == ["a", "g"]
    assert {(line["key"], line["reason"]) for line in lines} == {
        ("a", DUPLICATE_KEY),
        ("b", "text is of type list, expected string"),
        ("c", f"text is longer than {MAX_TEXT_LENGTH} characters"),
        ("d \udcff", "key is not Unicode text"),
        ("e", "group is of type str, expected int64"),
        ("f", "by choice"),
    }
    assert {"key": "a", "file": "list.jsonl", "row": 2, "reason": DUPLICATE_KEY} in lines
    assert summary.rows == 8
    assert sum(summary.errors.values()) == 5
    assert "by choice" not in summary.errors


def test_key_set_finds_keys_in_memory_and_file() -> None:
    with KeySet(in_memory=10) as seen:
        assert all(seen.add(str(number)) for number in range(57))
        assert not any(seen.add(str(number)) for number in range(57))
        assert seen.add("\udcff")
        assert not seen.add("\udcff")


def test_unit_is_unpacked_without_a_copy(tmp_path: Path) -> None:
    (block,), _, _ = read([row("a"), row("b", text="二")], tmp_path)
    unit = pack_unit(block)
    before = pa.total_allocated_bytes()
    table = unpack_unit(unit)
    assert pa.total_allocated_bytes() == before
    assert table.equals(block.table)


def test_spool_returns_the_same_units_as_reading(tmp_path: Path) -> None:
    archives = put_archive(tmp_path)
    corpus = Made()
    write_spool(corpus, SourceArchives(archives, corpus.archives), tmp_path / "made.arrows")
    job = CorpusJob(
        corpus, SourceArchives(archives, corpus.archives), tmp_path, staging_dir=tmp_path
    )
    live = list(read_units(3, job))
    reported = (tmp_path / REJECTED_ROWS).read_bytes()
    spooled = list(read_units(3, replace(job, spool=tmp_path / "made.arrows")))
    assert all(a.equals(b) for a, b in zip(live, spooled, strict=True))
    assert len(live) == len(list(read_spool_units(tmp_path / "made.arrows"))) == 13
    assert reported == rejected_rows_path(tmp_path / "made.arrows").read_bytes()


def test_full_disk_while_spooling_is_reported(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    archives, corpus = put_archive(tmp_path), Made()
    (tmp_path / "made.arrows").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"made\.arrows: the disk is full"):
        write_spool(corpus, SourceArchives(archives, corpus.archives), tmp_path / "made.arrows")


def test_quarantine_names_the_source_and_the_media() -> None:
    made = pa.table({"rejected": pa.array(["no pictures in it", None, "longer than 1 s"])})
    references = [MediaRef("/d/a.mp4"), MediaRef("/d/b.mp4"), MediaRef("/d/s.tgz", member="c.mp4")]
    block = pa.table(
        {
            "key": ["a", "b", "c"],
            "file": ["annotations.json", "annotations.json", None],
            "row": pa.array([1, 2, None], pa.int64()),
            "media": pa.array([reference.row() for reference in references], MEDIA),
        }
    )
    good, lines = split_rejected(made, block)
    assert good.num_rows == 1
    assert lines == [
        {
            "key": "a",
            "file": "annotations.json",
            "row": 1,
            "media": "/d/a.mp4",
            "reason": "no pictures in it",
        },
        {"key": "c", "media": "/d/s.tgz/c.mp4", "reason": "longer than 1 s"},
    ]


def test_finished_blocks_are_skipped_unless_their_rows_changed(tmp_path: Path) -> None:
    archives = put_archive(tmp_path)
    corpus = Made()
    job = CorpusJob(
        corpus, SourceArchives(archives, corpus.archives), tmp_path, staging_dir=tmp_path
    )
    every = list(read_units(0, job))
    keys = {f"{u['split'][0]}-{u['shard'][0].as_py():05d}": u["keys"][0].as_py() for u in every[:3]}
    first = next(iter(keys))
    job = replace(job, finished_keys=keys | {first: "of other rows"})
    again = list(read_units(0, job))
    assert len(again) == len(every) - 2
    assert again[-1]["units"][0].as_py() == len(again) - 1


def test_staging_dir_without_shards_is_removed(tmp_path: Path) -> None:
    table = pa.table({"key": ["a"]})
    with (
        pytest.raises(ValueError, match="stop"),
        staging_dir(tmp_path / "made", {"a": 1}) as folder,
    ):
        write_shard_entry(folder, "train", 0, table, [], "", {})
        raise ValueError("stop")
    assert folder.is_dir()
    with staging_dir(tmp_path / "made", {"a": 2}):
        assert not folder.exists()
    assert list(tmp_path.iterdir()) == []


def test_rare_reasons_are_counted_together() -> None:
    from collections import Counter

    reasons = Counter({f"reason {n}": n for n in range(1, MAX_REASONS + 11)})
    reported = count_reasons(reasons)
    assert len(reported) == MAX_REASONS + 1
    assert reported["other reasons"] == sum(range(1, 11))
    assert sum(reported.values()) == reasons.total()
