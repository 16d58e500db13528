"""Versions of a corpus that differ by rounding errors count as one, if a study records them."""

import json
from pathlib import Path

import pytest

from skillnet_platform import config as configuration
from skillnet_platform.errors import UserError
from skillnet_studies.analysis.finished_runs import (
    EQUAL_VERSIONS,
    compare_runs,
    label_runs,
    read_run,
)
from tests.helpers.synthetic_runs import write_run


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
        compare_runs([read_run(path) for path in paths])
    record = {"pairs": [{"corpus": "voices", "versions": ["a", "b"]}]}
    (tmp_path / EQUAL_VERSIONS).write_text(json.dumps(record))
    # Runs of both versions are runs of one configuration.
    runs = label_runs([read_run(path) for path in paths])
    assert set(compare_runs(runs).systems) == {"skillnet", "dense"}
    assert {run.digests["voices"] for run in runs} == {"a"}
    (tmp_path / EQUAL_VERSIONS).write_text('{"pairs": [{"versions": ["a"]}]}')
    with pytest.raises(UserError, match=r"equal_versions.json is damaged: a pair has not two"):
        read_run(paths[0])
