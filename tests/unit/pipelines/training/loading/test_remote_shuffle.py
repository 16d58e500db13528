"""Shuffling corpora in an object store, as a unit and in windows of shards."""

import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.data.shards.dataset import open_corpus
from pipelines.training.config.run import FinetuneConfig
from pipelines.training.loading.dataloader import MultiTaskDataLoader
from pipelines.training.loop.resolved_run import ResolvedRun
from skillnet_platform.errors import UserError
from skillnet_platform.storage import directories
from tests.helpers.small_corpora import small_config, write_corpora
from tests.unit.pipelines.data.shards.test_remote_corpora import same

CORPORA = ("drawings", "functions")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpora(tmp_path_factory.mktemp("corpora"), rows=60, shards=6)


@pytest.fixture
def store(data: Path, run_root: Path) -> str:
    """The corpora in a store, and an empty cache."""
    uri = f"memory://{uuid.uuid4().hex}"
    for name in CORPORA:
        directories.put_directory(data / name, directories.join_uri(uri, name))
    return uri


def config_of(data: Path | str, corpus: str = "drawings", shuffle_gb: float = 4) -> FinetuneConfig:
    config = small_config(Path(), shuffle_gb=shuffle_gb)
    # Shards of ten rows.
    tasks = {n: replace(t, batch_size=4) for n, t in config.tasks.items() if t.corpus == corpus}
    return replace(config, data=str(data), tasks=tasks)


def names_of(stream: MultiTaskDataLoader) -> tuple[list[str], list[int]]:
    """Shards of the only task's split, and their numbers in the order of their use."""
    (rows,), (order,) = stream.datasets.values(), stream._samplers.values()
    come = dict.fromkeys(shard for batch in range(15) for shard in order.shards(batch))
    return [
        str(shard["file"]) for split in rows.shard_table._splits for shard in split.shards
    ], list(come)


def test_corrupt_shard_is_reported_before_its_rows_are_used(store, data, monkeypatch):
    stream = ResolvedRun(config_of(store, shuffle_gb=1e-9)).dataloader  # windows of one shard
    names, come = names_of(stream)
    altered = names[come[3]]
    place = f"{store}/drawings/{altered}"
    good = directories.read_bytes(place)
    directories.write_bytes(place, good[:-1] + bytes([good[-1] ^ 1]))
    get, asked = directories.get_file, []
    monkeypatch.setattr(directories, "get_file", lambda *a: (asked.append(a[0]), get(*a)))
    seen = []
    with pytest.raises(UserError, match=rf"{altered}: altered or cut short: sha256 .* expected"):
        for step in range(10):
            seen.append(stream.batch(step).rows)
    assert len(seen) == 7  # 30 rows come before the fourth shard
    assert set((np.concatenate(seen) // 10).tolist()) <= set(come[:3])
    # Once ahead of need at most, and once for the message.
    assert 1 <= asked.count(place) <= 2
    directories.write_bytes(place, good)
    same(ResolvedRun(config_of(data, shuffle_gb=1e-9)).dataloader, stream, range(7, 12))


def test_cache_must_hold_the_corpus_once(store: str) -> None:
    size = open_corpus(f"{store}/drawings").splits["train"].bytes
    assert ResolvedRun(config_of(store)).dataloader.bytes_in_use() == size
    windows = config_of(store)
    windows = replace(windows, training=replace(windows.training, shuffle_gb=size / 4 / 1e9))
    assert ResolvedRun(windows).dataloader.bytes_in_use() == pytest.approx(size / 2, abs=1)
