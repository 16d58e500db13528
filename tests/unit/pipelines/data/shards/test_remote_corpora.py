"""Corpora in a store give the same batches as on a disk, with a cache smaller than they are."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.data.shards.dataset import open_corpus, verify_corpus
from pipelines.training.config.data import AUGMENTATIONS
from pipelines.training.config.run import FinetuneConfig
from pipelines.training.loading.dataloader import Batch, MultiTaskDataLoader
from pipelines.training.loop.resolved_run import ResolvedRun
from skillnet_platform.errors import UserError
from skillnet_platform.storage import directories
from skillnet_platform.storage.cache import GB, FileCache
from tests.helpers.object_store import BUCKET, ObjectStore, in_environment
from tests.helpers.prepared_corpora import write_manifest
from tests.helpers.small_corpora import MODALITY, small_config, write_corpora


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpora(tmp_path_factory.mktemp("corpora"), rows=60, shards=6)


@pytest.fixture(scope="module")
def uploaded(object_store_server: ObjectStore, data: Path) -> str:
    uri = f"s3://{BUCKET}/test-remote-corpora"
    with in_environment(object_store_server.environment):
        for name in MODALITY:
            directories.put_directory(data / name, directories.join_uri(uri, name))
    return uri


@pytest.fixture
def bucket(object_store: ObjectStore, uploaded: str, run_root: Path) -> str:
    """Return the URI of read-only corpora in a store, with an empty cache."""
    return uploaded


def tensors(batch: Batch) -> list[torch.Tensor]:
    towers = [x for tower in batch.towers.values() for x in tower.values()]
    return [*towers, *batch.targets.values(), torch.from_numpy(batch.rows)]


def same(
    one: MultiTaskDataLoader, other: MultiTaskDataLoader, steps: range, world: int = 1
) -> None:
    for step in steps:
        for rank in range(world):
            mine, theirs = one.batch(step, rank, world), other.batch(step, rank, world)
            assert mine.task == theirs.task
            for x, y in zip(tensors(mine), tensors(theirs), strict=True):
                assert torch.equal(x, y), (step, mine.task)


def test_remote_corpus_is_opened_by_its_manifest(bucket: str, data: Path) -> None:
    cache = FileCache(data.parent / "empty", GB)
    there, here = open_corpus(f"{bucket}/headings", cache=cache), open_corpus(data / "headings")
    assert (there.digest, there.rows, there.path) == (here.digest, here.rows, f"{bucket}/headings")
    held = [path.name for path in cache.folder.iterdir() if "." not in path.name]
    assert held == [there.manifest["shards"]["sha256"]], "no shard"
    split = there.splits["train"]
    assert split.table().equals(here.splits["train"].table())
    assert cache.used() == split.bytes + there.manifest["shards"]["bytes"]
    assert split.column("key").to_pylist() == here.splits["train"].column("key").to_pylist()
    assert verify_corpus(f"{bucket}/headings")["digest"] == here.digest


def test_remote_batches_equal_local_batches(bucket: str, data: Path) -> None:
    config = small_config(data)
    same(
        ResolvedRun(config).dataloader,
        ResolvedRun(replace(config, data=bucket)).dataloader,
        range(12),
        world=2,
    )


def windowed(data: Path | str, corpus: str, shuffle_gb: float) -> FinetuneConfig:
    config = small_config(Path())
    tasks = {name: task for name, task in config.tasks.items() if task.corpus == corpus}
    training = replace(config.training, shuffle_gb=shuffle_gb)
    return replace(config, data=str(data), tasks=tasks, training=training)


@pytest.mark.parametrize("corpus", ["drawings", "syllables", "functions"])
def test_corpus_larger_than_the_cache_is_read(bucket, data, corpus, run_root, capsys, monkeypatch):
    """Read three epochs in windows of two of six shards; the cache holds at most five."""
    split = open_corpus(data / corpus).splits["train"]
    shard = max(entry["bytes"] for entry in split.shards) / GB
    limit = 5.1 * shard
    monkeypatch.setenv("SKILLNET_CACHE_GB", str(limit))
    local = ResolvedRun(windowed(data, corpus, 2.1 * shard)).dataloader
    there = ResolvedRun(windowed(bucket, corpus, 2.1 * shard)).dataloader
    (rows,) = there.datasets.values()
    cache = FileCache(run_root / "cache" / "shards", int(limit * GB))
    seen = []
    for step in range(-(-3 * 60 // 6)):
        same(local, there, range(step, step + 1))
        assert cache.used() <= limit * GB
        assert len(rows.shard_table._open) <= 4
        seen.append(there.batch_spec(step).rows)
    for epoch in range(3):
        part = np.concatenate(seen)[60 * epoch : 60 * (epoch + 1)]
        assert len(part) < 60 or sorted(part.tolist()) == list(range(60))
    assert "the cache's limit" not in capsys.readouterr().err
    # Resuming anywhere needs no more than the windows there.
    same(local, ResolvedRun(windowed(bucket, corpus, 2.1 * shard)).dataloader, range(17, 19))


def test_too_small_cache_is_rejected_before_the_start(bucket, monkeypatch):
    monkeypatch.setenv("SKILLNET_CACHE_GB", "1e-5")
    said = r"SKILLNET_CACHE_GB.*or lower training.shuffle_gb \(4.0\)"
    with pytest.raises(UserError, match=said):
        _ = ResolvedRun(windowed(bucket, "drawings", 4.0)).dataloader


def test_completely_shuffled_corpus_keeps_its_order(data: Path) -> None:
    config = small_config(data)
    corpora = {name: open_corpus(data / name) for name in MODALITY}
    before = MultiTaskDataLoader(
        corpora, config.trained, config.model, config.seed, AUGMENTATIONS[config.training.augment]
    )
    same(before, ResolvedRun(config).dataloader, range(8))


def test_damaged_remote_shard_is_reported(object_store, data, run_root):
    place = f"{object_store.uri}/drawings"
    directories.put_directory(data / "drawings", place)
    shard = open_corpus(place).splits["train"].shards[0]["file"]
    good = directories.read_bytes(f"{place}/{shard}")
    directories.write_bytes(f"{place}/{shard}", good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(UserError, match=rf"{shard}: altered or cut short.*expected"):
        open_corpus(place).splits["train"].table()
    with pytest.raises(UserError, match=rf"{shard}: this shard was altered: sha256"):
        verify_corpus(place)
    directories.write_bytes(f"{place}/{shard}", good[:-1])
    with pytest.raises(UserError, match=rf"{shard}: this shard was altered: .* bytes"):
        open_corpus(place)
    directories.remove_file(f"{place}/{shard}")
    with pytest.raises(UserError, match=rf"{shard}: this shard is missing.*skillnet prepare drawi"):
        open_corpus(place)
    directories.remove_file(f"{place}/manifest.json")
    with pytest.raises(UserError, match="not a prepared corpus"):
        open_corpus(place)
    with pytest.raises(UserError, match="missing"):
        open_corpus(f"{object_store.uri}/nothing")


def test_manifest_cannot_lead_out_of_the_cache(object_store, tmp_path, data, run_root):
    folder = tmp_path / "evil"
    shutil.copytree(data / "headings", folder)

    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest["shards"]["sha256"] = "../" * 21 + "x"
    write_manifest(folder, manifest)
    directories.put_directory(folder, f"{object_store.uri}/evil")
    with pytest.raises(UserError, match=r"shards\.sha256 is missing or damaged"):
        open_corpus(f"{object_store.uri}/evil")
