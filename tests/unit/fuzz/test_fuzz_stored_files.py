"""Random damage to everything that is read: it still works, or a named error says what is wrong.

A short lane by default; ``make fuzz`` is the long one. Runs that go on: ``test_fuzz_resume.py``.

Random trees as configurations: no process starts, no number is absurd, every error has a name.

A short lane by default; ``make fuzz`` is the long one.

Random ids in prepared corpora with right hashes, and files that change after their check.

They are in range, or a named error says what is wrong.
"""

import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from pipelines.data.shards.dataset import open_corpus
from pipelines.data.shards.format import SHARD_TABLE, write_corpus_manifest, write_shard
from pipelines.data.tokenizer.guarded_loader import check_pattern, parse_tokenizer
from pipelines.data.transforms.text import encode_texts
from pipelines.training.config.growth import GrowConfig
from pipelines.training.config.run import FinetuneConfig, PretrainConfig
from pipelines.training.loading.pixel_changes import apply_changes
from pipelines.training.loading.task_dataset import TaskDataset
from pipelines.training.loop.resolved_run import ResolvedRun
from skillnet.model import SkillNet
from skillnet.objectives.heads import LossInputs, head_class
from skillnet_platform import config
from skillnet_platform.config.schema import INSTANTIATION_KEYS
from skillnet_platform.errors import UserError
from skillnet_studies.config.study import StudyConfig
from sweeps.config.sweep import SweepConfig
from tests.helpers.exchanged_files import find_buffers
from tests.helpers.limited_child import run_limited
from tests.helpers.prepared_corpora import read_manifest
from tests.helpers.random_damage import PLACES, VALUES, WOUNDS, budget, damaged, named, replaced
from tests.helpers.small_corpora import (
    VOCABULARY,
    small_config,
    small_pretraining,
    write_corpora,
)
from tests.helpers.stored_files import STORED, StoredFiles, read_trees, tokenizer_text, write_trees

pytestmark = pytest.mark.fuzz

#: What a round of ``make fuzz`` found, or its authors thought of.
KNOWN_DAMAGE = {"archives": [[("swap", 0.5, 4), ("swap", 0.5, 28)]]}
SLOW_PATTERN = {"type": "Replace", "pattern": {"Regex": "(x+x+)+y"}, "content": ""}
KNOWN_VALUES: dict[str, list[tuple[Any, list[int]]]] = {
    "configuration": [([], [10])],
    "corpus": [([], [28, 0, 1])],
    "tokenizer": [(SLOW_PATTERN, [4]), ({"type": "Sequence", "normalizers": []}, [4])],
    "served tasks": [("\ud83d", [8, 0, 2])],
}
DAMAGED = [name for name, each in STORED.items() if each.budget]


def write_whole(name: str, folder: Path) -> StoredFiles:
    """Write the whole files of a kind; return the kind."""
    folder.mkdir()
    STORED[name].write(folder)
    return STORED[name]


def read_altered(
    stored: StoredFiles,
    whole: Path,
    globs: tuple[str, ...],
    number: int,
    alter: Callable[[Path], object],
    sealed: bool,
) -> None:
    """Alter the file of a number in a fresh copy, and read the copy."""
    folder = whole.with_name("altered")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    files = stored.list_files(folder, globs)
    path = files[number % len(files)]
    alter(path)
    if sealed and stored.seal:
        stored.seal(folder, path)

    def read() -> None:
        for each in stored.reads:
            named(partial(each, folder, path))

    run_limited(read) if stored.is_limited else read()


@pytest.mark.parametrize("name", STORED)
def test_whole_files_are_read(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "whole"
    stored = write_whole(name, folder)
    for path in stored.list_files(folder, stored.files):
        values = [read(folder, path) for read in stored.reads]
        assert stored.whole in (None, values[0])


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files(name: str, tmp_path: Path) -> None:
    stored = write_whole(name, tmp_path / "whole")

    @given(st.integers(0, 40), WOUNDS, st.booleans())
    @budget(*stored.budget)
    def try_damage(number: int, wounds: Any, sealed: bool) -> None:
        def alter(path: Path) -> None:
            path.write_bytes(damaged(path.read_bytes(), wounds))

        read_altered(stored, tmp_path / "whole", stored.files, number, alter, sealed)

    for known in KNOWN_DAMAGE.get(name, []):
        try_damage = example(0, known, True)(try_damage)
    try_damage()


@pytest.mark.parametrize("name", [name for name in DAMAGED if STORED[name].trees])
def test_any_value_anywhere(name: str, tmp_path: Path) -> None:
    stored = write_whole(name, tmp_path / "whole")

    @given(st.integers(0, 40), VALUES, PLACES)
    @budget(*stored.budget)
    def try_value(number: int, value: Any, place: list[int]) -> None:
        def alter(path: Path) -> None:
            trees = [replaced(tree, place, value) for tree in read_trees(path)]
            write_trees(path, trees)

        read_altered(stored, tmp_path / "whole", stored.trees, number, alter, True)

    for known in KNOWN_VALUES.get(name, []):
        try_value = example(0, *known)(try_value)
    try_value()


@given(st.sampled_from(sorted(config.flatten_tree(config.to_dict(FinetuneConfig())))), st.text())
@example("seed", "!!python/name:os.system")
@example("tasks", "{a: 1, a: 2}")
@budget(8)
def test_any_word_for_any_key(key: str, word: str) -> None:
    named(lambda: config.parse_config(FinetuneConfig, [f"--{key}={word}"], prog="x"))


@given(st.text(alphabet="ab()[]{}|*+?.,^\\12", max_size=12))
@example("(a*)*b")
@budget(6)
def test_accepted_patterns_end_in_time(pattern: str) -> None:
    tree = json.loads(tokenizer_text())
    split = {"type": "Split", "pattern": {"Regex": pattern}}
    tree["pre_tokenizer"] = split | {"behavior": "Isolated", "invert": False}

    def split_text() -> None:
        check_pattern("pattern", pattern)
        encode_texts(parse_tokenizer(tree), ["a" * 40 + "!"], 64)

    run_limited(lambda: named(split_text))


TREES = {cls: config.default_values(cls) for cls in (FinetuneConfig, PretrainConfig, SweepConfig)}
TREES |= {cls: config.default_values(cls) for cls in (StudyConfig, GrowConfig)}
STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "ctypes.dlopen")
PAYLOAD = {"class_path": "subprocess.Popen", "init_args": {"args": "id", "shell": True}}

TARGETS = st.sampled_from(["os.system", "subprocess.Popen", "builtins.eval", "pathlib.Path"])
OBJECTS = st.builds(
    lambda names, target, arguments: dict.fromkeys(names, arguments) | {names[0]: target},
    st.lists(st.sampled_from(sorted(INSTANTIATION_KEYS)), min_size=1, unique=True),
    TARGETS,
    VALUES,
)
FREE_KEYS = {
    FinetuneConfig: ["options.x"],
    PretrainConfig: ["options.x", "options.x.y"],
    SweepConfig: ["run.options.x", "space.x.options.a.b", "space.x.grid"],
    StudyConfig: ["systems.x.options.y", "systems.x.set.y"],
    GrowConfig: ["skill", "task"],
}


class ProcessStartError(BaseException):
    """A configuration started a process; no handler of ordinary exceptions catches this."""


def _forbid_processes(event: str, arguments: Any) -> None:
    if event in STARTS:
        raise ProcessStartError(f"{event} {arguments}")


def _build(cls: type, tree: dict[str, Any]) -> None:
    # The hook cannot be removed, so this function runs in a child only.
    sys.addaudithook(_forbid_processes)
    named(lambda: _require_plain(config.to_dict(config.build_config(cls, tree))))


def _require_plain(value: Any) -> None:
    """Assert that a value has JSON's types only, and only finite numbers."""
    if isinstance(value, dict):
        for below in value.values():
            _require_plain(below)
    elif isinstance(value, list):
        for each in value:
            _require_plain(each)
    else:
        assert value is None or isinstance(value, (str, bool, int, float)), type(value)
        assert not isinstance(value, float) or math.isfinite(value)


@given(st.sampled_from(list(TREES)), st.one_of(VALUES, OBJECTS), PLACES)
@example(FinetuneConfig, float("nan"), [9, 2])
@example(FinetuneConfig, PAYLOAD, [6])
@budget(12)
def test_any_value_anywhere_builds_plain_values(cls: type, value: Any, place: list[int]) -> None:
    tree = replaced(TREES[cls], place, value)
    if isinstance(tree, dict):
        run_limited(lambda: _build(cls, tree))


@given(st.sampled_from(list(FREE_KEYS)), st.integers(0, 2), st.one_of(VALUES, OBJECTS))
@example(FinetuneConfig, 0, PAYLOAD)
@example(SweepConfig, 2, [[PAYLOAD]])
@budget(12)
def test_any_value_below_a_free_key_starts_nothing(cls: type, at: int, value: Any) -> None:
    key = FREE_KEYS[cls][at % len(FREE_KEYS[cls])]
    tree: Any = value
    for part in reversed(key.split(".")):
        tree = {part: tree}
    complete = config.merge_trees(config.default_values(cls), tree)
    run_limited(lambda: _build(cls, complete))


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
    shard, *described = (
        corpora / name / file for file in ("train-00000.arrow", "manifest.json", SHARD_TABLE)
    )
    before = [path.read_bytes() for path in (shard, *described)]
    started, allocated = time.process_time(), pa.total_allocated_bytes()
    try:
        changed = _replace_ids(before[0], column, ids, kind)
        entry = write_shard(changed, shard)
        manifest = read_manifest(corpora / name)
        manifest["splits"]["train"] = {"rows": entry["rows"], "shards": [entry]}
        write_corpus_manifest(corpora / name, manifest)
        try:
            table = open_corpus(corpora / name).splits["train"].table()
        except UserError as error:
            assert column in str(error)  # noqa: PT017
        else:
            assert set(_flatten(table.column(column).to_pylist())) <= set(VALID[place])
    finally:
        for path, content in zip((shard, *described), before, strict=True):
            path.write_bytes(content)
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
