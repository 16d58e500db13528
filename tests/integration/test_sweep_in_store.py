"""Sweeps and studies in an object store, with separate disks that are lost."""

import csv
import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.training.config.run import PretrainConfig
from skillnet_platform import config as configuration
from skillnet_platform.errors import UserError
from skillnet_platform.storage import directories
from skillnet_platform.tracking import backend
from skillnet_studies.study.kept_results import fetch_finished_runs
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
from importlib import import_module
from skillnet_platform import cluster
here, there, command, *words = sys.argv[1:]
main = import_module(command).main
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


def sweep_file(path: Path, data: str) -> Path:
    body = {
        "name": "kept",
        "run": one_task(
            data,
            **{"steps": 60, "checkpoint_every": 10, "evaluate_every": 20},
            **{"precision": "fp32", "weight_decay": 10.0, "max_grad_norm": 0.0},
        ),
        "tracking": {"system_metrics": False},
        # The last one fails while it trains: decay multiplies its weights by -99 per step.
        "space": {"training.lr": {"choice": [1e-3, 2e-3, 10.0]}},
        "resources": {"max_concurrent_trials": 1},
        "keep": 1,
    }
    path.write_text(json.dumps(body), encoding="utf-8")
    return path


def start(disks: Path, command: str, words: list[str]) -> "subprocess.Popen[str]":
    places = [str(disks / name) for name in ("driver", "trials")]
    program = ("-c", DRIVER, *places, command, *words)
    return start_python(*program, start_new_session=True, stderr=subprocess.PIPE)


def kill_and_lose_disks(
    tmp_path: Path, command: str, words: list[str], is_due: Callable[[], bool]
) -> None:
    """Kill the driver and all below it when it is due, and remove their disks."""
    driver = start(tmp_path / "first", command, words)
    try:
        wait_until(is_due, 300, process=driver, pause=0.25)
    finally:
        kill_family(driver)
    shutil.rmtree(tmp_path / "first")


def resume_elsewhere(tmp_path: Path, command: str, words: list[str], kept: str) -> dict[str, Any]:
    """Give the same command on other disks; return its result."""
    again = start(tmp_path / "second", command, words)
    output, errors = again.communicate(timeout=400)
    assert again.returncode == 0, errors
    assert f"kept is resumed from {kept}" in errors
    return dict(json.loads(output))


def put_corpus(place: ObjectStore, tmp_path: Path) -> str:
    """Put the corpus of the task into a store, where alone it then is; the URI of all corpora."""
    directories.write_bytes(f"{place.uri}/marker", b"")
    corpora = write_corpora(tmp_path / "corpora")
    directories.put_directory(corpora / "headings", f"{place.uri}/corpora/headings")
    shutil.rmtree(corpora)
    return f"{place.uri}/corpora"


@pytest.mark.slow("test_sweeps.py::test_asha_a_failure_and_a_resumed_sweep")
def test_a_sweep_resumes_from_the_store_after_all_disks_are_lost(
    object_store: ObjectStore, tmp_path: Path
) -> None:
    data = put_corpus(object_store, tmp_path)
    runs = f"{object_store.uri}/runs"
    kept = f"{runs}/kept"
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    path = sweep_file(tmp_path / "sweep.yaml", data)
    words = ["--config", str(path), "--run_dir", runs, "--tracking.uri", uri, "--json"]

    def there(name: str) -> bool:
        return directories.object_exists(f"{kept}/trials/{name}")

    def has_second_checkpoint() -> bool:
        checkpoint = "001-seed0/checkpoints/step-00000010/manifest.json"
        return there("000-seed0/outcome.json") and there(checkpoint)

    kill_and_lose_disks(tmp_path, "sweeps.sweep", words, has_second_checkpoint)
    assert not there("001-seed0/result.json")
    finished = directories.read_bytes(f"{kept}/trials/000-seed0/result.json")
    result = resume_elsewhere(tmp_path, "sweeps.sweep", words, kept)
    assert result["counts"] == {"finished": 2, "stopped": 0, "failed": 1}
    assert result["mirror"] == kept
    assert directories.read_bytes(f"{kept}/trials/000-seed0/result.json") == finished, (
        "not run again"
    )
    here = tmp_path / "second/driver/kept"
    second = json.loads((here / "trials/001-seed0/result.json").read_text(encoding="utf-8"))
    assert second["resumed"] > 0, "it resumed from its checkpoint"
    assert second["run"] == str(here / "trials/001-seed0"), "its paths are those of this disk"
    assert not (tmp_path / "second/trials/kept/trials/000-seed0").exists()

    trials = {trial["name"]: trial for trial in result["trials"]}
    broken = trials["002-seed0"]
    assert broken["status"] == "failed"
    assert "not finite" in broken["error"]
    assert "Traceback" in Path(broken["log"]).read_text(encoding="utf-8")
    with Path(result["files"]["trials"]).open(encoding="utf-8") as stream:
        rows = {row["name"]: row for row in csv.DictReader(stream)}
    assert rows["001-seed0"]["status"] == "finished"
    reports = (here / "trials/001-seed0/reports.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line)["step"] for line in reports.splitlines()][-1] == 60

    # Of the models only the best is left, in the store; no disk has one.
    best = result["best"]["name"]
    models = {name: there(f"{name}-seed0/model/manifest.json") for name in ("000", "001")}
    assert models == {name: name == best for name in models}
    assert not list(tmp_path.glob("second/*/kept/trials/*/model"))
    ending = {"sweep.yaml", "run.json", "trials.csv", "best.yaml", "score.png", "result.json"}
    assert ending <= {entry.name for entry in directories.list_files(kept)}
    chosen = configuration.load_yaml(Path(result["best"]["config"]))
    assert chosen["run_dir"] == runs
    assert not chosen["storage"]["mirror"]

    client = backend.create_client(uri)
    below = client.search_runs(
        [client.get_run(result["run_id"]).info.experiment_id],
        f"tags.`mlflow.parentRunId` = '{result['run_id']}'",
    )
    states = {run.info.run_name: run.info.status for run in below}
    assert states == {"000-seed0": "FINISHED", "001-seed0": "FINISHED", "002-seed0": "FAILED"}


def test_a_missing_bucket_is_reported_before_anything_starts(
    object_store: ObjectStore, tmp_path: Path
) -> None:
    path = sweep_file(tmp_path / "sweep.yaml", f"{object_store.uri}/corpora")
    words = ["--config", str(path), "--run_dir", "s3://no-such-bucket/runs"]
    done = run_python("-m", "sweeps.sweep", *words, variables={"SKILLNET_HOME": str(tmp_path)})
    assert done.returncode == 2
    assert "there is no bucket 'no-such-bucket'" in done.stderr
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

    ended = f"{kept}/runs/skillnet-seed0/outcome.json"
    kill_and_lose_disks(
        tmp_path, "skillnet_studies.compare", words, lambda: directories.object_exists(ended)
    )
    finished = {
        entry.name: directories.read_bytes(f"{kept}/{entry.name}")
        for entry in directories.list_files(kept)
        if entry.name.endswith("/result.json")
    }
    assert len(finished) >= 4, "a trial, two pretrainings, and a final run"
    result = resume_elsewhere(tmp_path, "skillnet_studies.compare", words, kept)
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
