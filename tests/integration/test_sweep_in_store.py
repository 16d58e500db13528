"""A study in an object store, with separate disks that are lost."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.training.config.run import PretrainConfig
from skillnet_platform import config as configuration
from skillnet_platform.errors import UserError
from skillnet_platform.storage import directories
from skillnet_studies.study.kept_results import fetch_finished_runs
from sweeps import sweep
from tests.helpers.object_store import ObjectStore
from tests.helpers.processes import kill_family, run_python, start_python
from tests.helpers.small_corpora import small_config, write_corpora
from tests.helpers.waiting import wait_until

pytestmark = pytest.mark.integration

TASK = "text_classification"
#: A driver whose trials run on a "host" with a run root of its own: Ray's processes get the
#: environment of the moment in which Ray starts.
DRIVER = """
import os, sys
from skillnet_platform import cluster
from skillnet_studies.compare import main
here, there, *words = sys.argv[1:]
os.environ["SKILLNET_HOME"] = there
with cluster.ray_session(cpus=2):
    os.environ["SKILLNET_HOME"] = here
    sys.exit(main(words))
"""


def one_task(data: str, **training: Any) -> dict[str, Any]:
    """A run as a file has it, of a small model and one task."""
    run = configuration.to_dict(replace(small_config(Path("unused"), **training), data=data))
    for tasks in (run["tasks"], run["model"]["tasks"]):
        tasks |= dict.fromkeys(tasks.keys() - {TASK})  # a null takes the default away
    return run


def start(disks: Path, words: list[str]) -> "subprocess.Popen[str]":
    places = [str(disks / name) for name in ("driver", "trials")]
    program = ("-c", DRIVER, *places, *words)
    return start_python(*program, start_new_session=True, stderr=subprocess.PIPE)


def put_corpus(place: ObjectStore, tmp_path: Path) -> str:
    """Put the corpus of the task into a store, where alone it then is; the URI of all corpora."""
    directories.write_bytes(f"{place.uri}/marker", b"")
    corpora = write_corpora(tmp_path / "corpora")
    directories.put_directory(corpora / "headings", f"{place.uri}/corpora/headings")
    shutil.rmtree(corpora)
    return f"{place.uri}/corpora"


def test_a_missing_bucket_is_reported_before_anything_starts(
    object_store: ObjectStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SKILLNET_HOME", str(tmp_path))
    path = tmp_path / "sweep.yaml"
    body = {"name": "kept", "run": one_task(f"{object_store.uri}/corpora")}
    path.write_text(json.dumps(body | {"space": {"training.lr": {"choice": [1e-3, 2e-3]}}}))
    assert sweep.main(["--config", str(path), "--run_dir", "s3://no-such-bucket/runs"]) == 2
    assert "there is no bucket 'no-such-bucket'" in capsys.readouterr().err
    assert not (tmp_path / "mlflow.db").exists()


def study_file(path: Path, data: str) -> Path:
    training = {"steps": 6, "log_every": 2, "precision": "fp32"}
    masked: dict[str, Any] = dict.fromkeys(PretrainConfig().tasks)
    masked["masked_text"] = {
        "corpus": "headings",
        "batch_size": 4,
        "split": "train",
        "max_length": 16,
    }
    body = {
        "name": "kept",
        "seeds": [0, 1],
        "run": one_task(data, **training),
        "pretraining": {"tasks": masked, "training": training},
        "systems": {
            "skillnet": {"system": "skillnet"},
            "skillnet-pretrained": {
                "system": "skillnet", "pretrain": True, "reuse_tuning_of": "skillnet",
            },
        },
        "tuning": {"trials": 1, "seeds": [9], "space": {"training.lr": {"choice": [0.01]}}},
        "tracking": {"system_metrics": False},
        "resources": {"max_concurrent_trials": 1},
    }  # fmt: skip
    path.write_text(json.dumps(body), encoding="utf-8")
    return path


@pytest.mark.slow("test_compare.py::test_a_study_runs_and_resumes")
def test_a_study_resumes_and_is_compared_from_the_store(
    object_store: ObjectStore, tmp_path: Path
) -> None:
    data = put_corpus(object_store, tmp_path)
    runs = f"{object_store.uri}/runs"
    kept = f"{runs}/kept"
    path = study_file(tmp_path / "study.yaml", data)
    tracked = ["--tracking.uri", f"sqlite:///{tmp_path}/mlflow.db", "--json"]
    words = ["--config", str(path), "--run_dir", runs, *tracked]

    # The driver is killed with all below it, and their disks are lost.
    ended = f"{kept}/runs/skillnet-seed0/outcome.json"
    driver = start(tmp_path / "first", words)
    try:
        wait_until(lambda: directories.object_exists(ended), 300, process=driver, pause=0.25)
    finally:
        kill_family(driver)
    shutil.rmtree(tmp_path / "first")
    finished = {
        entry.name: directories.read_bytes(f"{kept}/{entry.name}")
        for entry in directories.list_files(kept)
        if entry.name.endswith("/result.json")
    }
    assert len(finished) >= 4, "a trial, two pretrainings, and a final run"
    again = start(tmp_path / "second", words)
    output, errors = again.communicate(timeout=400)
    assert again.returncode == 0, errors
    assert f"kept is resumed from {kept}" in errors
    result = json.loads(output)
    for name, content in finished.items():
        assert directories.read_bytes(f"{kept}/{name}") == content, "not run again"
    assert {(run["system"], run["seed"]) for run in result["runs"]} == {
        (system, seed) for system in ("skillnet", "skillnet-pretrained") for seed in (0, 1)
    }
    here = tmp_path / "second/driver/kept"
    assert not list(tmp_path.glob("second/*/kept/*/*/model")), "models are in the store alone"
    there = {entry.name for entry in directories.list_files(kept)}
    assert {"study.yaml", "study.json", "report.html", "summary.csv"} <= there
    assert "runs/skillnet-pretrained-seed1/model/manifest.json" in there
    assert not [name for name in there if name.startswith("tuning/") and "/model/" in name]
    page = (here / "report.html").read_text(encoding="utf-8")
    assert "Effect of each skill" in page
    settings = configuration.load_yaml(here / "runs/skillnet-pretrained-seed1/config.yaml")
    start_of_it = Path(settings["init_from"])
    assert start_of_it.is_relative_to(tmp_path / "second/driver")
    assert (start_of_it / "trained.json").is_file(), "the report states the cost of pretraining"

    # A comparison of finished runs needs no Ray.
    third = run_python(
        *("-m", "skillnet_studies.compare", kept, "--name", "once-more", *tracked),
        variables={"SKILLNET_HOME": str(tmp_path / "third")},
    )
    assert third.returncode == 0, third.stderr
    assert json.loads(third.stdout)["summary"] == result["summary"]


def test_a_missing_run_is_named(object_store: ObjectStore, run_root: Path) -> None:
    directories.write_bytes(f"{object_store.uri}/marker", b"")
    with pytest.raises(UserError, match="holds no finished run"):
        fetch_finished_runs(f"{object_store.uri}/no-such-run")
