"""Random ids in prepared corpora with right hashes, and files that change after their check.

They are in range, or a named error says what is wrong.
"""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from pipelines.data.shards.dataset import open_corpus
from pipelines.data.shards.format import manifest_digest, write_shard
from pipelines.training.loading.pixel_changes import apply_changes
from pipelines.training.loading.task_dataset import TaskDataset
from pipelines.training.loop.resolved_run import ResolvedRun
from skillnet.model import SkillNet
from skillnet.objectives.heads import LossInputs, head_class
from skillnet_platform.errors import UserError
from tests.helpers.exchanged_files import find_buffers
from tests.helpers.limited_child import run_limited
from tests.helpers.random_damage import WOUNDS, budget, damaged, named
from tests.helpers.small_corpora import (
    VOCABULARY,
    small_config,
    small_pretraining,
    write_corpora,
)

pytestmark = pytest.mark.fuzz

#: Of processor time: the machine may be busy.
MAX_SECONDS = 5.0
MAX_BYTES = 64 * 2**20
#: Corpus and id column -> the valid ids.
VALID = {
    ("headings", "tokens"): range(VOCABULARY),
    ("headings", "label"): range(15),
    ("functions", "caption_tokens"): range(VOCABULARY),
    ("syllables", "symbols"): range(1, 62),
}
IDS = st.integers(-(2**63), 2**63 - 1) | st.integers(-2, VOCABULARY + 2) | st.none()
TYPES = st.sampled_from([pa.int8(), pa.int32(), pa.uint32(), pa.int64(), pa.float64()])


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpora(tmp_path_factory.mktemp("ids") / "data", rows=8, test_rows=4, shards=1)


@given(st.sampled_from(sorted(VALID)), st.lists(IDS, min_size=1, max_size=8), TYPES)
@example(("syllables", "symbols"), [2**31 - 1], pa.int32())
@example(("headings", "label"), [2**63 - 1], pa.int64())
@budget(30)
def test_ids_of_any_value_are_in_range_or_rejected(
    corpora: Path, place: tuple[str, str], ids: list[int | None], kind: pa.DataType
) -> None:
    name, column = place
    shard, manifest_file = (
        corpora / name / file for file in ("train-00000.arrow", "manifest.json")
    )
    before = shard.read_bytes(), manifest_file.read_bytes()
    started, allocated = time.process_time(), pa.total_allocated_bytes()
    try:
        changed = _replace_ids(before[0], column, ids, kind)
        entry = write_shard(changed, shard)
        manifest = json.loads(before[1])
        manifest["splits"]["train"]["shards"] = [entry]
        manifest["digest"] = manifest_digest(manifest)
        manifest_file.write_text(json.dumps(manifest), encoding="utf-8")
        try:
            table = open_corpus(corpora / name).splits["train"].table()
        except UserError as error:
            assert column in str(error)  # noqa: PT017
        else:
            assert set(_flatten(table.column(column).to_pylist())) <= set(VALID[place])
    finally:
        shard.write_bytes(before[0])
        manifest_file.write_bytes(before[1])
    assert time.process_time() - started < MAX_SECONDS
    assert pa.total_allocated_bytes() - allocated < MAX_BYTES


def _replace_ids(shard: bytes, column: str, ids: list[Any], kind: pa.DataType) -> pa.Table:
    """Return the table of a shard with other ids of another type; they fill the first row."""
    table = pa.ipc.open_file(pa.py_buffer(shard)).read_all()
    place = table.schema.get_field_index(column)
    cells = table.column(column).to_pylist()
    values = pa.array(ids, pa.int64()).cast(kind, safe=False).to_pylist()
    levels = str(table.schema.field(place).type).count("list")
    cells[0] = {0: values[0], 1: values, 2: [values]}[levels]
    for _ in range(levels):
        kind = pa.list_(kind)
    return table.set_column(place, pa.field(column, kind), pa.array(cells, kind))


def _flatten(cells: list[Any]) -> list[Any]:
    return [x for cell in cells for x in (_flatten(cell) if isinstance(cell, list) else [cell])]


#: Corpus and column whose offsets and values change.
MAPPED = [*VALID, ("functions", "tokens"), ("drawings", "caption_tokens"), ("drawings", "group")]
MAPPED += [("drawings", "pixels"), ("syllables", "log_mel"), ("headings", "key")]


@given(st.sampled_from(MAPPED), WOUNDS)
@example(("syllables", "symbols"), [("fill", 0.0, 48)])
@example(("headings", "label"), [("flip", 0.5, 255)])
@budget(8)
def test_shards_that_change_after_each_check(
    corpora: Path, place: tuple[str, str], wounds: Any
) -> None:
    shard = corpora / place[0] / "train-00000.arrow"
    before = shard.read_bytes()
    try:
        run_limited(lambda: _train_on_changed(corpora, shard, place[1], wounds))
    finally:
        shard.write_bytes(before)


def _train_on_changed(corpora: Path, shard: Path, column: str, wounds: Any) -> None:
    """Open and check the corpora, change the file, and compute losses and gradients of all rows."""
    torch.set_num_threads(1)
    runs = [make(corpora) for make in (small_config, small_pretraining)]
    loaders = [ResolvedRun(run).dataloader for run in runs]
    for buffer in find_buffers(shard, column):
        with shard.open("r+b") as stream:
            stream.seek(buffer.start)
            content = stream.read(buffer.count * buffer.kind.itemsize)
            stream.seek(buffer.start)
            # A shorter file would end the process by SIGBUS, which no check prevents.
            stream.write(damaged(content, wounds)[: len(content)].ljust(len(content), b"\xff"))
    for run, loader in zip(runs, loaders, strict=True):
        model = SkillNet(run.model)
        for name, dataset in loader.datasets.items():
            if shard.parent.name in dataset.location:
                named(lambda: _step(model, name, dataset))  # noqa: B023


def _step(model: SkillNet, name: str, dataset: TaskDataset) -> None:
    towers, targets = apply_changes(*dataset.load(np.arange(dataset.num_rows)))
    outputs = model(name, towers)
    loss = head_class(dataset.task).compute_loss(outputs, LossInputs(targets, dataset.num_rows))
    loss.backward()
