"""Random damage to everything that is read: it still works, or a named error says what is wrong.

A short lane by default; ``make fuzz`` is the long one. Runs that go on: ``test_fuzz_resume.py``.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from pipelines.data.corpora.archives import iter_members
from pipelines.data.shards.dataset import open_corpus
from pipelines.data.shards.format import FORMAT_VERSION, manifest_digest, write_shard
from pipelines.training.config.run import FinetuneConfig, TrainingConfig
from pipelines.training.loop import checkpointing
from pipelines.training.loop.optimizer import build_optimizer
from pipelines.training.runs import checkpoints
from skillnet import systems
from skillnet.serialization import write_manifest
from skillnet_platform import config
from tests.helpers.archive_files import packaged, tarred, zipped
from tests.helpers.random_damage import PLACES, VALUES, WOUNDS, budget, damaged, named, replaced
from tests.helpers.small_models import small_model

pytestmark = pytest.mark.fuzz

ROOT = Path(__file__).parents[3]
PRESETS = [path.read_bytes() for path in sorted((ROOT / "configs").glob("*.yaml"))]


# -- configurations ----------------------------------


@given(st.sampled_from(PRESETS), WOUNDS)
@budget(40)
def test_damaged_presets(tmp_path_factory: Any, text: bytes, wounds: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(damaged(text, wounds))
    named(lambda: config.check_keys(FinetuneConfig, config.load_layer(path), str(path)))


@given(VALUES, PLACES)
@example([], [10])
@budget(8)
def test_configurations_with_any_value_anywhere(
    tmp_path_factory: Any, value: Any, place: list[int]
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.json"
    tree = replaced(config.to_dict(FinetuneConfig()), place, value)
    path.write_text(json.dumps(tree))  # JSON is YAML
    named(lambda: config.parse_config(FinetuneConfig, ["--config", str(path)], prog="x"))


@given(st.sampled_from(sorted(config.flatten_tree(config.to_dict(FinetuneConfig())))), st.text())
@example("seed", "!!python/name:os.system")
@example("tasks", "{a: 1, a: 2}")
@budget(8)
def test_any_word_for_any_key(key: str, word: str) -> None:
    named(lambda: config.parse_config(FinetuneConfig, [f"--{key}={word}"], prog="x"))


# -- archives ----------------------------------

FILES = {f"folder/{n}.json": bytes(range(n, 250)) for n in range(5)}
ARCHIVES = [zipped(FILES), tarred(FILES), packaged(FILES)]


@given(st.sampled_from(ARCHIVES), WOUNDS)
@example(ARCHIVES[0], [("swap", 0.5, 4), ("swap", 0.5, 28)])
@budget(150)
def test_damaged_archives(tmp_path_factory: Any, data: bytes, wounds: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.archive"
    path.write_bytes(damaged(data, wounds))
    named(lambda: list(iter_members(path, lambda name: True)))


# -- corpora ----------------------------------


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of one shard with each sort of column."""
    directory = tmp_path_factory.mktemp("fuzz") / "made"
    directory.mkdir()
    table = pa.table(
        {
            "key": [f"字{n}" for n in range(20)],
            "tokens": pa.array([[1, 2, 3]] * 20, pa.list_(pa.int32())),
            "captions": pa.array([["one", "two"], []] * 10, pa.list_(pa.string())),
        }
    )
    entry = write_shard(table, directory / "train-00000.arrow")
    manifest = {
        "format_version": FORMAT_VERSION,
        "corpus": "made",
        "modality": "text",
        "task": "text_classification",
        "splits": {"train": {"rows": 20, "shards": [entry]}},
    }
    reseal(directory, manifest)
    return directory


def reseal(directory: Path, manifest: Any) -> None:
    """Write a manifest with a correct digest, as an attacker who alters a corpus can."""
    if isinstance(manifest, dict):
        manifest = manifest | {"digest": manifest_digest(manifest)}
    (directory / "manifest.json").write_text(json.dumps(manifest))


def read_all(directory: Path) -> None:
    for split in open_corpus(directory, verify=True).splits.values():
        split.table().to_pylist()


@given(VALUES, PLACES)
@example([], [28, 0, 1])
@budget(100)
def test_manifests_with_any_value_anywhere(shard: Path, value: Any, place: list[int]) -> None:
    whole = (shard / "manifest.json").read_text()
    try:
        reseal(shard, replaced(json.loads(whole), place, value))
        named(lambda: read_all(shard))
    finally:
        (shard / "manifest.json").write_text(whole)


@given(WOUNDS)
@budget(100)
def test_damaged_shards_with_the_right_digest(shard: Path, wounds: Any) -> None:
    from hashlib import sha256

    copy = shard.with_name("copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(shard, copy)
    path = copy / "train-00000.arrow"
    data = damaged(path.read_bytes(), wounds)
    path.write_bytes(data)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0] |= {
        "bytes": len(data),
        "sha256": sha256(data).hexdigest(),
    }
    reseal(copy, manifest)
    named(lambda: read_all(copy))


# -- checkpoints ----------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny model of one task."""
    folder = tmp_path_factory.mktemp("fuzz")
    model = small_model(torch.float32, num_layers=1)
    small = folder / "model"
    model.save_pretrained(small)
    model = systems.load_model(small, "text_classification")
    optimizer = build_optimizer(model.named_parameters(), TrainingConfig())
    return checkpointing.write_checkpoint(folder / "run", 1, model, optimizer, None, {}, keep=1)


@given(st.integers(0, 20), WOUNDS, st.booleans())
@budget(60)
def test_damaged_checkpoints(saved: Path, number: int, wounds: Any, sealed: bool) -> None:
    copy = saved.parent.parent / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(saved, copy)
    files = sorted(copy.iterdir())
    path = files[number % len(files)]
    path.write_bytes(damaged(path.read_bytes(), wounds))
    if sealed and path.name != "manifest.json":
        write_manifest(copy, [each.name for each in files if each.name != "manifest.json"])
    named(lambda: checkpoints.verify_checkpoint(copy))
    named(lambda: systems.load_model(copy))
