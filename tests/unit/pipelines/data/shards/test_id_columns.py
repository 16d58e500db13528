"""Ids outside their table are rejected where shards are read, although all hashes are right."""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipelines.data.shards.columns import NestedRaggedColumn, open_column
from pipelines.data.shards.dataset import open_corpus, verify_corpus
from pipelines.data.shards.format import write_shard
from pipelines.data.shards.id_columns import IdRange
from pipelines.training.evaluation.inference import split_inputs
from pipelines.training.loop.resolved_run import ResolvedRun
from skillnet_platform.errors import UserError
from skillnet_platform.storage import sha256_file
from tests.helpers.exchanged_files import overwrite_offsets, overwrite_values
from tests.helpers.prepared_corpora import change_corpus
from tests.helpers.small_corpora import VOCABULARY, small_config, small_pretraining, write_corpora

#: Corpus, id column, and the first id after its range: 15 labels, 61 symbols after the blank.
COLUMNS = [
    ("headings", "tokens", VOCABULARY),
    ("headings", "label", 15),
    ("functions", "tokens", VOCABULARY),
    ("functions", "caption_tokens", VOCABULARY),
    ("drawings", "caption_tokens", VOCABULARY),
    ("strokes", "caption_tokens", VOCABULARY),
    ("syllables", "symbols", 62),
]
ROW = 3


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpora(tmp_path_factory.mktemp("whole") / "data")


@pytest.fixture
def data(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "data"))


def rewrite_shard(corpus: Path, column: str, change: Callable[[pa.Array], pa.Array]) -> Path:
    """Change a column of the second training shard; return its path."""
    path = corpus / "train-00001.arrow"
    table = pa.ipc.open_file(pa.py_buffer(path.read_bytes())).read_all()
    place = table.schema.get_field_index(column)
    changed = change(table.column(column).combine_chunks())
    table = table.set_column(place, pa.field(column, changed.type), changed)
    entry = write_shard(table, path)

    def replace_entry(manifest: dict[str, Any]) -> None:
        manifest["splits"]["train"]["shards"][1] = entry

    change_corpus(corpus, change=replace_entry)
    return path


def with_id(value: int, row: int = ROW) -> Callable[[pa.Array], pa.Array]:
    """Return a change that sets the last id of a row."""

    def change(column: pa.Array) -> pa.Array:
        cells = column.to_pylist()
        cell = cells[row]
        if not isinstance(cell, list):
            cells[row] = value
        elif isinstance(cell[-1], list):
            cell[-1][-1] = value
        else:
            cell[-1] = value
        return pa.array(cells, column.type)

    return change


@pytest.mark.parametrize("below", [True, False])
@pytest.mark.parametrize(("name", "column", "stop"), COLUMNS)
def test_an_id_outside_the_manifests_range_is_rejected_when_its_shard_opens(
    data, name, column, stop, below
):
    first = 1 if column == "symbols" else 0
    value = first - 1 if below else stop
    path = rewrite_shard(data / name, column, with_id(value))
    message = re.escape(
        f"{path}: column '{column}', row {ROW}: the id {value} is outside {first} to {stop - 1}"
    )
    corpus = open_corpus(data / name)
    with pytest.raises(UserError, match=message):
        corpus.splits["train"].table()
    with pytest.raises(UserError, match=message):
        verify_corpus(data / name)
    with pytest.raises(UserError, match=message):
        loader = ResolvedRun(small_config(data)).dataloader
        for dataset in loader.datasets.values():
            dataset.load(np.arange(dataset.num_rows))


@pytest.mark.parametrize(("name", "column", "stop"), COLUMNS)
def test_an_id_outside_the_models_range_is_rejected_before_a_batch(data, name, column, stop):
    """A manifest that declares no size, or a larger one, does not decide what the model holds."""
    path = rewrite_shard(data / name, column, with_id(stop))

    def declare_nothing(manifest: dict[str, Any]) -> None:
        manifest["tokenizer"] = None
        del manifest["labels"], manifest["symbols"]

    change_corpus(data / name, change=declare_nothing)
    with pytest.raises(UserError, match=re.escape(f"{path}: column '{column}', row {ROW}: ")):
        loader = ResolvedRun(small_config(data)).dataloader
        for dataset in loader.datasets.values():
            dataset.load(np.arange(dataset.num_rows))


def test_inference_rejects_tokens_outside_the_models_vocabulary(data: Path) -> None:
    config = replace(small_config(data).model, vocab_size=8)
    plan = config.tasks["text_classification"].towers["input"]
    table = open_corpus(data / "headings").splits["test"].table()
    with pytest.raises(UserError, match=r"headings/test: column 'tokens', row \d+: the id"):
        split_inputs(table, plan, config, "headings/test")


def test_ids_that_are_no_integers_are_rejected(data: Path) -> None:
    rewrite_shard(data / "headings", "label", lambda column: column.cast(pa.float32()))
    with pytest.raises(UserError, match=r"column 'label': holds float, expected integers"):
        open_corpus(data / "headings").splits["train"].table()


def test_empty_ids_are_rejected(data: Path) -> None:
    def change(column: pa.Array) -> pa.Array:
        cells = column.to_pylist()
        cells[ROW][0] = None
        return pa.array(cells, column.type)

    rewrite_shard(data / "syllables", "symbols", change)
    with pytest.raises(UserError, match=rf"column 'symbols', row {ROW}: an id is empty"):
        open_corpus(data / "syllables").splits["train"].table()


def test_offsets_outside_of_the_values_are_rejected(data: Path) -> None:
    """Offsets lead to values that Arrow and numpy would read outside of the file."""

    path = rewrite_shard(data / "syllables", "symbols", lambda column: column)
    table = pa.ipc.open_file(pa.py_buffer(path.read_bytes())).read_all()
    ends = table.column("symbols").chunk(0).offsets.to_numpy()
    far = np.append(ends[:-1], ends[-1] + (1 << 20)).astype(np.int32)
    content = path.read_bytes()
    assert content.count(ends.tobytes()) == 1
    path.write_bytes(content.replace(ends.tobytes(), far.tobytes()))

    def rehash(manifest: dict[str, Any]) -> None:
        manifest["splits"]["train"]["shards"][1]["sha256"] = sha256_file(path)

    change_corpus(data / "syllables", change=rehash)
    with pytest.raises(UserError, match=re.escape(f"{path}: not a readable shard")):
        open_corpus(data / "syllables").splits["train"].table()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokenizer", {"vocab_size": "64"}),
        ("tokenizer", {"vocab_size": 0}),
        ("tokenizer", 3),
        ("labels", {"a": 1}),
        ("symbols", [1, 2]),
    ],
)
def test_a_manifest_with_a_damaged_size_is_rejected(data: Path, key: str, value: object) -> None:
    change_corpus(data / "headings", **{key: value})
    with pytest.raises(UserError, match=rf"{key}.* is missing or damaged"):
        open_corpus(data / "headings")


#: Column -> what one row of it holds.
CELLS = {
    "label": (3, pa.int32()),
    "tokens": ([3, 4], pa.list_(pa.int32())),
    "label_set": ([1], pa.list_(pa.int32())),
    "symbols": ([5, 1], pa.list_(pa.int32())),
    "paired_tokens": ([2], pa.list_(pa.int32())),
    "caption_tokens": ([[1, 2], [3]], pa.list_(pa.list_(pa.int32()))),
}


@pytest.mark.parametrize("value", [0, -(2**31), 8, 2**31 - 1])
@pytest.mark.parametrize("column", CELLS)
def test_ids_that_change_in_the_mapped_file_are_rejected_in_the_copy(tmp_path, column, value):
    cell, kind = CELLS[column]
    path = tmp_path / "x.arrow"
    write_shard(pa.table({column: pa.array([cell] * 5, kind)}), path)
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    opened = open_column(table, column, "x/train", IdRange("the model has 7", 8, first=1))
    reader = opened.inner if isinstance(opened, NestedRaggedColumn) else opened
    reader.take(np.arange(len(reader)))
    overwrite_values(path, column, value)
    with pytest.raises(UserError, match=rf"x/train: column '{column}': the id {value} is outside"):
        reader.take(np.arange(len(reader)))


@pytest.mark.parametrize("value", [-1, 2**31 - 1])
@pytest.mark.parametrize(("name", "column", "stop"), COLUMNS)
def test_a_shard_that_changes_after_its_check_reaches_no_kernel(data, name, column, stop, value):
    loaders = [ResolvedRun(make(data)).dataloader for make in (small_config, small_pretraining)]
    overwrite_values(data / name / "train-00001.arrow", column, value)
    message = rf"{name}/.*train: column '{column}': the id {value} is outside"
    for loader in loaders:
        readers = [d for d in loader.datasets.values() if d.location.startswith(name)]
        for dataset in readers if loader is loaders[0] or column == "tokens" else ():
            with pytest.raises(UserError, match=message):
                dataset.load(np.arange(dataset.num_rows))


@pytest.mark.parametrize("value", [-1, 2**31 - 1, 2**20])
@pytest.mark.parametrize("column", ["symbols", "caption_tokens", "key", "tokens"])
def test_offsets_that_change_in_the_mapped_file_are_not_followed(data, column, value):
    name = {"symbols": "syllables", "tokens": "headings"}.get(column, "drawings")
    loader = ResolvedRun(small_config(data)).dataloader
    split = open_corpus(data / name).splits["train"]
    before = split.table().column(column).combine_chunks().to_pylist()
    overwrite_offsets(data / name / "train-00001.arrow", column, value)
    assert split.table().column(column).combine_chunks().to_pylist() == before
    for dataset in loader.datasets.values():
        dataset.load(np.arange(dataset.num_rows))


def test_inference_rejects_ids_that_change_after_its_check(data: Path) -> None:
    config = small_config(data).model
    table = open_corpus(data / "headings").splits["test"].table()
    plan = config.tasks["text_classification"].towers["input"]
    inputs = split_inputs(table, plan, config, "headings/test")
    overwrite_values(data / "headings" / "test-00000.arrow", "tokens", VOCABULARY)
    with pytest.raises(UserError, match=r"headings/test: column 'tokens': the id 64 is outside"):
        inputs.load_batch(np.arange(len(inputs)))
