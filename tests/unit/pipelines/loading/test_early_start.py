"""Corpora in a store whose first batch does not wait for all shards."""

import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.config.run import FinetuneConfig
from pipelines.loading.dataloader import MultiTaskDataLoader
from pipelines.runs.identity import identity_of
from pipelines.shards.dataset import open_corpus
from pipelines.training.setup import open_stream
from skillnet_platform.errors import UserError
from skillnet_platform.storage import directories
from skillnet_platform.storage.cache import FileCache, Wanted
from skillnet_platform.storage.directories import StoreUnavailable
from tests.helpers.small_corpora import small_config, write_corpora
from tests.unit.pipelines.shards.test_remote_corpora import same

CORPORA = ("drawings", "functions")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpora(tmp_path_factory.mktemp("corpora"), rows=60, shards=6)


@pytest.fixture
def store(data: Path, run_root: Path) -> str:
    """The corpora in a store, and an empty cache."""
    uri = f"memory://{uuid.uuid4().hex}"
    for name in CORPORA:
        directories.put_directory(data / name, directories.join(uri, name))
    return uri


def config_of(data: Path | str, corpus: str = "drawings", early: bool = True) -> FinetuneConfig:
    config = small_config(Path(), early_start=early)
    # Shards of ten rows, of which five come before the next: the second batch needs the second.
    tasks = {n: replace(t, batch=4) for n, t in config.tasks.items() if t.corpus == corpus}
    return replace(config, data=str(data), tasks=tasks)


def names_of(stream: MultiTaskDataLoader) -> tuple[list[str], list[int]]:
    """Shards of the only task's split, and their numbers in the order in which they come."""
    (rows,), (order,) = stream.rows.values(), stream._orders.values()
    return [str(shard["file"]) for _, shard in rows.held._shards], order.shards(6)


@pytest.mark.parametrize("corpus", CORPORA)
def test_the_first_batch_does_not_wait_for_all_shards(
    store: str, data: Path, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the first shard are away; then they are back, and all is as on the disk."""
    there, here = open_stream(config_of(store, corpus)), open_stream(config_of(data, corpus))
    names, come = names_of(here)
    get = directories.get_file

    def only_the_first(uri: str, *more: str) -> None:
        if not uri.endswith(names[come[0]]):
            raise StoreUnavailable(f"{uri} is on its way")
        get(uri, *more)

    monkeypatch.setattr(directories, "get_file", only_the_first)
    same(here, there, range(1))
    with pytest.raises(StoreUnavailable, match=rf"{names[come[1]]} is on its way"):
        there.batch(1)
    monkeypatch.setattr(directories, "get_file", get)
    same(here, there, range(24), world=2)
    # Going on in the part that grows needs nothing of what ran before.
    same(here, open_stream(config_of(store, corpus)), range(4, 6))


def test_an_altered_shard_is_named_before_its_rows_are_used(
    store: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = open_stream(config_of(store))
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
    assert len(seen) == 3  # 15 rows come before the fourth shard
    assert set((np.concatenate(seen) // 10).tolist()) <= set(come[:3])
    # Once ahead of need at most, and once for the message.
    assert 1 <= asked.count(place) <= 2
    directories.write_bytes(place, good)
    same(open_stream(config_of(data)), stream, range(3, 6))


def test_a_whole_shuffle_fetches_in_the_order_of_need(
    store: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted: list[Wanted] = []
    monkeypatch.setattr(FileCache, "prefetch", lambda self, more: wanted.extend(more))
    stream = open_stream(config_of(store, early=False))
    stream.batch(0)
    shards = open_corpus(data / "drawings").splits["train"].shards
    numbers = {shard["sha256"]: number for number, shard in enumerate(shards)}
    rows = np.concatenate([stream.plan(step).rows for step in range(10)])
    needed = list(dict.fromkeys((rows // 10).tolist()))
    assert [numbers[one.sha256] for one in wanted[:6]] == needed


def test_it_is_of_the_identity_only_where_it_is_asked_for(data: Path) -> None:
    late, early = (identity_of(config_of(data, early=each))["training"] for each in (False, True))
    assert "early_start" not in late  # checkpoints from before stay of the same run
    assert early.pop("early_start") is True
    assert early == late


def test_the_cache_has_to_hold_the_corpus_once(store: str) -> None:
    size = open_corpus(f"{store}/drawings").splits["train"].bytes
    assert open_stream(config_of(store)).bytes_in_use() == size
    windows = config_of(store)
    windows = replace(windows, training=replace(windows.training, shuffle_gb=size / 4 / 1e9))
    assert open_stream(windows).bytes_in_use() == pytest.approx(size / 2, abs=1)
