"""Shards open in three libraries, and altered shards are detected."""

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import polars
import pyarrow as pa
import pytest

from pipelines.data.shards.dataset import open_corpus, verify_corpus
from pipelines.data.shards.format import (
    SHARD_TABLE,
    manifest_digest,
    shard_bytes,
    tensor_field,
    write_shard,
)
from skillnet_platform.errors import UserError
from tests.helpers.prepared_corpora import write_corpus, write_manifest

ROWS = 5


def table() -> pa.Table:
    pixels = np.arange(ROWS * 12, dtype=np.uint8)
    mel = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(2.0 * ROWS, dtype=np.float32)), 2)
    schema = pa.schema(
        [
            pa.field("key", pa.string()),
            tensor_field("pixels", pa.uint8(), (2, 2, 3)),
            pa.field("log_mel", pa.list_(pa.list_(pa.float32(), 2))),
            pa.field("caption_tokens", pa.list_(pa.list_(pa.int32()))),
        ]
    )
    columns = [
        pa.array([f"字{n}" for n in range(ROWS)]),
        pa.FixedSizeListArray.from_arrays(pa.array(pixels), 12),
        pa.ListArray.from_arrays(pa.array([0, 1, 1, 2, 4, 5], pa.int32()), mel),
        pa.array([[[1], [2, 3]], [], [[]], [[4]], [[5]]], pa.list_(pa.list_(pa.int32()))),
    ]
    return pa.table(columns, schema=schema)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Write a corpus of two shards in one split."""
    about = {"modality": "image", "task": "text_to_image", "made_with": {"pyarrow": "any"}}
    return write_corpus(tmp_path / "made", {"train": [table()] * 2}, **about)


def test_a_shard_opens_in_pyarrow_polars_and_datasets(tmp_path: Path) -> None:
    path = tmp_path / "x.arrow"
    write_shard(table(), path)
    want = table().to_pylist()
    with pa.memory_map(str(path)) as source:
        assert pa.ipc.open_file(source).read_all().to_pylist() == want
    assert polars.read_ipc(path)["caption_tokens"].to_list() == [r["caption_tokens"] for r in want]
    assert polars.read_ipc(path)["pixels"].to_list() == [r["pixels"] for r in want]
    assert datasets.Dataset.from_file(str(path)).to_list() == want


def test_shape_is_in_the_metadata_of_the_field(corpus: Path) -> None:
    field = open_corpus(corpus).schema.field("pixels")
    assert json.loads(field.metadata[b"shape"]) == [2, 2, 3]
    assert field.type == pa.list_(pa.uint8(), 12)


def test_rows_are_memory_mapped_not_copied(corpus: Path) -> None:
    before = pa.total_allocated_bytes()
    split = open_corpus(corpus).splits["train"]
    assert split.rows == split.table().num_rows == 2 * ROWS
    pixels = split.column("pixels").chunk(1).flatten().to_numpy(zero_copy_only=True)
    assert pixels[13] == 13
    assert pa.total_allocated_bytes() - before < 1024


def test_equal_tables_with_other_chunks_give_equal_bytes() -> None:
    pieces = pa.concat_tables([table().slice(0, 2), table().slice(2)])
    assert shard_bytes(pieces) == shard_bytes(table())


def test_unknown_column_is_reported(corpus: Path) -> None:
    with pytest.raises(UserError, match=r"no column 'pixel'.*pixels"):
        open_corpus(corpus).splits["train"].column("pixel")


def test_verification_detects_a_changed_byte(corpus: Path) -> None:
    shard = corpus / "train-00001.arrow"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    open_corpus(corpus)  # sizes are right: only hashing tells
    with pytest.raises(UserError, match=r"train-00001\.arrow: this shard was altered: sha256"):
        verify_corpus(corpus)


def test_truncated_shard_is_rejected_when_opened(corpus: Path) -> None:
    shard = corpus / "train-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"train-00000\.arrow: this shard was altered: \d+ bytes"):
        open_corpus(corpus)


def test_missing_shard_is_reported(corpus: Path) -> None:
    (corpus / "train-00001.arrow").unlink()
    with pytest.raises(UserError, match=r"train-00001\.arrow: this shard is missing"):
        open_corpus(corpus)


TABLE_CHANGES: dict[str, tuple[Callable[[pa.Table], pa.Table], str]] = {
    "fewer": (lambda shards: shards.slice(1), "not a readable shard.*1 rows, expected 2"),
    "file": (lambda shards: shards.drop_columns("file"), "has other columns"),
    "text": (lambda shards: set_field(shards, "rows", ["5", "5"]), "has other columns"),
    "unknown": (lambda shards: set_field(shards, "rows", [5, None], pa.int64()), "other columns"),
    "rows": (lambda shards: set_field(shards, "rows", [4, 5]), "has other shards or rows"),
    "negative": (lambda shards: set_field(shards, "rows", [-5, 15]), "has a negative size"),
    "bytes": (lambda shards: set_field(shards, "bytes", [1, 2]), r"altered: \d+ bytes, expected 1"),
    **{
        name: (
            lambda shards, name=name: set_field(shards, "file", [name, "train-00001.arrow"]),
            "which is no file of this folder",
        )
        for name in ("../made/train-00000.arrow", "/etc/passwd", "a//b", "", ".", "a/..", "a\\b")
    },
    "folder": (lambda shards: set_field(shards, "file", ["a/b", "a"]), "b: this shard is missing"),
}


def set_field(
    shards: pa.Table, name: str, values: list[object], kind: pa.DataType | None = None
) -> pa.Table:
    place = shards.schema.get_field_index(name)
    return shards.set_column(place, name, pa.array(values, kind))


@pytest.mark.parametrize("change", TABLE_CHANGES)
def test_a_table_of_shards_that_is_not_one_is_rejected(corpus: Path, change: str) -> None:
    """A user who can write the table can write its digest, too."""
    path = corpus / SHARD_TABLE
    before = path.read_bytes()
    edit, message = TABLE_CHANGES[change]
    entry = write_shard(edit(pa.ipc.open_file(before).read_all()), corpus / "new")
    (corpus / "new").replace(path)
    with pytest.raises(UserError, match=r"shards\.arrow: this shard was altered"):
        open_corpus(corpus)
    manifest = json.loads((corpus / "manifest.json").read_text(encoding="utf-8"))
    manifest["shards"] |= {key: entry[key] for key in ("bytes", "sha256")}
    write_manifest(corpus, manifest)
    with pytest.raises(UserError, match=message):
        open_corpus(corpus)


def test_directory_without_a_manifest_is_not_a_corpus(corpus: Path) -> None:
    (corpus / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"not a prepared corpus.*skillnet prepare made"):
        open_corpus(corpus)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("mode", "missing. Did you mean 'made', which is prepared? If not: run"),
        (
            "hedings",
            "missing. Run `skillnet prepare headings`, or `skillnet prepare --corpus NAME=PATH`",
        ),
        (
            "drawings",
            "missing. Run `skillnet prepare drawings`, or `skillnet prepare --corpus NAME=PATH`",
        ),
        ("nothing", "missing. Run `skillnet prepare --corpus NAME=PATH` for your own files. Prep"),
    ],
)
def test_the_remedy_for_a_missing_corpus_has_no_typing_error(corpus, name, remedy):
    with pytest.raises(UserError) as caught:
        open_corpus(corpus.with_name(name))
    assert remedy in str(caught.value)
    shown = str(caught.value).removeprefix(str(corpus.with_name(name)))
    assert name in ("drawings",) or name not in shown


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format_version", 99, "format version 99"),
        ("task", "another", "changed after it was written"),
    ],
)
def test_edited_manifest_is_rejected(corpus: Path, key: str, value: object, message: str) -> None:
    path = corpus / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**manifest, key: value}), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        open_corpus(corpus)


def test_library_versions_do_not_change_the_digest(corpus: Path) -> None:
    manifest = json.loads((corpus / "manifest.json").read_text(encoding="utf-8"))
    assert manifest_digest({**manifest, "made_with": {}}) == manifest["digest"]
    assert manifest_digest({**manifest, "corpus": "other"}) != manifest["digest"]
