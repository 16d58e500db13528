"""A sweep kept in a store: the driver and the trials see different disks, and lose them."""

import contextlib
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from skillnet_platform import config as configuration
from skillnet_platform import remote, store
from tests.object_store import ObjectStore
from tests.small_corpora import small_config, write_corpora

pytestmark = pytest.mark.integration

TASK = "text_classification"
#: A driver whose trials run on a "host" with a run root of its own: Ray's processes get the
#: environment of the moment in which Ray starts.
DRIVER = """
import os, sys
from skillnet_platform import cluster
from sweeps.sweep import main
here, there, *words = sys.argv[1:]
os.environ["SKILLNET_HOME"] = there
with cluster.session(cpus=2):
    os.environ["SKILLNET_HOME"] = here
    sys.exit(main(words))
"""


def sweep_file(path: Path, data: str) -> Path:
    config = small_config(Path("unused"), steps=60, checkpoint_every=10, evaluate_every=20)
    run = configuration.to_dict(replace(config, data=data))
    for tasks in (run["tasks"], run["model"]["tasks"]):
        tasks |= dict.fromkeys(tasks.keys() - {TASK})  # a null takes the default away
    body = {
        "name": "kept",
        "run": run,
        "tracking": {"system_metrics": False},
        # The last one fails while it trains: its weights leave the numbers.
        "space": {"training.lr": {"choice": [1e-3, 2e-3, 1e300]}},
        "resources": {"parallel": 1},
        "keep": 1,
    }
    path.write_text(json.dumps(body), encoding="utf-8")
    return path


def start(disks: Path, words: list[str], **options: Any) -> "subprocess.Popen[str]":
    places = [str(disks / name) for name in ("driver", "trials")]
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, *places, *words],
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def kill(driver: "subprocess.Popen[str]") -> None:
    """With all it started."""
    if driver.poll() is not None:
        return
    family = [driver, *psutil.Process(driver.pid).children(recursive=True)]
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    driver.communicate()


def test_a_sweep_goes_on_from_the_store_when_all_disks_are_lost(
    object_store: ObjectStore, tmp_path: Path
) -> None:
    remote.write_bytes(f"{object_store.uri}/marker", b"")
    corpora = write_corpora(tmp_path / "corpora")
    remote.put_directory(corpora / "headings", f"{object_store.uri}/corpora/headings")
    shutil.rmtree(corpora)
    runs = f"{object_store.uri}/runs"
    kept = f"{runs}/kept"
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    path = sweep_file(tmp_path / "sweep.yaml", f"{object_store.uri}/corpora")
    words = ["--config", str(path), "--run_dir", runs, "--tracking.uri", uri, "--json"]

    def there(name: str) -> bool:
        return remote.exists(f"{kept}/trials/{name}")

    driver = start(tmp_path / "first", words)
    try:
        end = time.monotonic() + 240
        checkpoint = "001-seed0/checkpoints/step-00000010/manifest.json"
        while not (there("000-seed0/outcome.json") and there(checkpoint)):
            assert driver.poll() is None, driver.communicate()
            assert time.monotonic() < end, "no checkpoint of the second trial came"
            time.sleep(0.05)
    finally:
        kill(driver)
    assert not there("001-seed0/result.json")
    finished = remote.read_bytes(f"{kept}/trials/000-seed0/result.json")
    shutil.rmtree(tmp_path / "first")

    again = start(tmp_path / "second", words)
    said, told = again.communicate(timeout=400)
    assert again.returncode == 0, told
    assert f"kept is taken up from {kept}" in told
    result = json.loads(said)
    assert result["counts"] == {"finished": 2, "stopped": 0, "failed": 1}
    assert result["mirror"] == kept
    assert remote.read_bytes(f"{kept}/trials/000-seed0/result.json") == finished, "not run again"
    here = tmp_path / "second/driver/kept"
    second = json.loads((here / "trials/001-seed0/result.json").read_text(encoding="utf-8"))
    assert second["resumed"] > 0, "it went on from its checkpoint"
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
    assert ending <= {entry.name for entry in remote.list_files(kept)}
    chosen = configuration.load_yaml(Path(result["best"]["config"]))
    assert chosen["run_dir"] == runs
    assert not chosen["storage"]["mirror"]

    client = store.client(uri)
    below = client.search_runs(
        [client.get_run(result["run_id"]).info.experiment_id],
        f"tags.`mlflow.parentRunId` = '{result['run_id']}'",
    )
    states = {run.info.run_name: run.info.status for run in below}
    assert states == {"000-seed0": "FINISHED", "001-seed0": "FINISHED", "002-seed0": "FAILED"}


def test_a_store_that_is_not_there_is_told_before_anything_starts(
    object_store: ObjectStore, tmp_path: Path
) -> None:
    path = sweep_file(tmp_path / "sweep.yaml", f"{object_store.uri}/corpora")
    words = ["--config", str(path), "--run_dir", "s3://no-such-bucket/runs"]
    done = subprocess.run(
        [sys.executable, "-m", "sweeps.sweep", *words],
        env={**os.environ, "SKILLNET_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "there is no bucket 'no-such-bucket'" in done.stderr
    assert not (tmp_path / "mlflow.db").exists()
