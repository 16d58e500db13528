"""Versions of a corpus that differ by rounding errors count as one, if a study records them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from benchmarks.equal_versions import VersionDifference, main
from pipelines.data.shards.dataset import open_corpus
from pipelines.data.shards.format import MANIFEST, manifest_digest, write_shard
from skillnet_platform import config as configuration
from skillnet_platform.errors import UserError
from skillnet_studies.analysis.comparison import compare_systems
from skillnet_studies.analysis.equal_versions import EQUAL_VERSIONS, read_equal_versions
from skillnet_studies.analysis.finished_runs import read_run
from skillnet_studies.analysis.run_groups import label_runs
from tests.helpers.synthetic_runs import write_run


def write_version(folder: Path, change: Callable[[np.ndarray], np.ndarray]) -> Path:
    """Write a corpus of one shard whose features are changed."""
    folder.mkdir(parents=True)
    features = change(np.linspace(0, 1, 12, dtype=np.float32))
    frames = pa.FixedSizeListArray.from_arrays(pa.array(features), 2)
    table = pa.table(
        {
            "key": ["a", "b", "c"],
            "log_mel": pa.ListArray.from_arrays(pa.array([0, 1, 4, 6], pa.int32()), frames),
        }
    )
    shard = write_shard(table, folder / "train-00000.arrow")
    manifest = {"format_version": 2, "corpus": "voices", "modality": "sound", "task": "speech"}
    manifest |= {"pretraining": [], "symbols": ["a"]}
    manifest |= {"splits": {"train": {"rows": 3, "shards": [shard]}}}
    manifest["digest"] = manifest_digest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def shift_first(by: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda values: np.concatenate([values[:1] + np.float32(by), values[1:]])


def test_rounding_errors_are_recorded_and_larger_differences_rejected(tmp_path: Path, capsys):
    one = write_version(tmp_path / "one", lambda values: values)
    near = write_version(tmp_path / "near", shift_first(1e-9))
    far = write_version(tmp_path / "far", shift_first(0.1))
    assert main([str(one), str(far), "--output", str(tmp_path)]) == 1
    assert "these are different data" in capsys.readouterr().err
    assert read_equal_versions(tmp_path) == {}
    for _ in range(2):
        assert main([str(one), str(near), "--output", str(tmp_path)]) == 0
    (pair,) = json.loads((tmp_path / EQUAL_VERSIONS).read_text())["pairs"]
    assert (pair["rows"], pair["values"], pair["different"]) == (3, 12, 1)
    digests = [open_corpus(path).digest for path in (one, near)]
    assert read_equal_versions(tmp_path) == {digests[1]: digests[0]}


def test_other_keys_lengths_and_splits_are_no_rounding_errors(tmp_path: Path):
    values = pa.array([0.0, 1.0, 2.0])
    one = pa.table({"x": pa.ListArray.from_arrays([0, 1, 3], values), "key": ["a", "b"]})
    other = one.set_column(0, "x", pa.ListArray.from_arrays([0, 2, 3], values))
    with pytest.raises(UserError, match="split train: values of x have other lengths"):
        VersionDifference().add_table(one, other, "split train")
    other = one.set_column(1, "key", pa.array(["a", "c"]))
    with pytest.raises(UserError, match="split train: values of key differ"):
        VersionDifference().add_table(one, other, "split train")
    missing = pa.table({"x": [1.0, None]})
    found = VersionDifference()
    found.add_table(missing, pa.table({"x": [1.0, 2.0]}), "split train")
    assert found.largest == float("inf"), "a missing value is no rounding error"


def write_study(folder: Path) -> list[Path]:
    """Two systems and two seeds; the second seed read another version of its corpus."""
    paths = []
    for system in ("skillnet", "dense"):
        for seed in (0, 1):
            path = write_run(folder / "runs" / f"{system}-seed{seed}", system, seed)
            (path / "result.json").write_text(
                json.dumps({"corpora": {"voices": "ab"[seed]}, "total_params": 1})
            )
            settings = configuration.load_yaml(path / "config.yaml")
            settings["corpora"] = {"voices": "ab"[seed]}
            (path / "config.yaml").write_text(configuration.to_yaml(settings))
            paths.append(path)
    return paths


def test_a_study_with_two_versions_is_compared_if_they_are_recorded(tmp_path: Path):
    paths = write_study(tmp_path)
    with pytest.raises(UserError, match="different versions of the corpus voices"):
        compare_systems([read_run(path) for path in paths])
    record = {"pairs": [{"corpus": "voices", "versions": ["a", "b"]}]}
    (tmp_path / EQUAL_VERSIONS).write_text(json.dumps(record))
    # Runs of both versions are runs of one configuration.
    runs = label_runs([read_run(path) for path in paths])
    assert set(compare_systems(runs).systems) == {"skillnet", "dense"}
    assert {run.digests["voices"] for run in runs} == {"a"}
    (tmp_path / EQUAL_VERSIONS).write_text('{"pairs": [{"versions": ["a"]}]}')
    with pytest.raises(UserError, match=r"equal_versions.json is damaged: a pair has not two"):
        read_run(paths[0])
