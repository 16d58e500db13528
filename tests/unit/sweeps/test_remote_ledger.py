"""The ledger of a sweep in an object store: upload, restore, and precedence of files."""

import json
from pathlib import Path

import pytest

from pipelines.training.config.run import FinetuneConfig, StorageConfig
from pipelines.training.runs.mirror import RunMirror
from skillnet_platform.errors import UserError
from skillnet_platform.storage import directories, write_json
from sweeps.config.sweep import SweepConfig
from sweeps.sweep import START_FILES, _resolve_config
from sweeps.trials import remote_ledger
from sweeps.trials.ledger import LedgerEntry
from sweeps.trials.trial import Trial, read_reports

SPACE = {"training.lr": {"choice": [1e-3, 2e-3]}}


def trial_at(folder: Path, uri: str) -> LedgerEntry:
    folder.mkdir(parents=True)
    return LedgerEntry(Trial("000", FinetuneConfig()), folder, RunMirror(uri, folder))


def test_an_empty_disk_restores_the_ledger_without_models(object_store, tmp_path):
    uri = f"{object_store.uri}/sweep"
    here = trial_at(tmp_path / "here/trials/000", f"{uri}/trials/000")
    assert here.mirror is not None
    (here.folder / "config.yaml").write_text("seed: 0\n")
    for name in ("trial.json", "run.json"):
        (here.folder / name).write_text('{"run_id": "known"}')
    (here.folder.parent / "proposed.jsonl").write_text('{"lr": 1}\n')
    remote_ledger.send_trial(here.mirror)
    for step in (4, 2, 4):
        here.add_report({"step": step, "score": step / 10, "scores": {}})
    assert [line["step"] for line in read_reports(here.folder)] == [2, 4], "none is kept twice"
    assert here.steps_done() == 4
    assert here.settle("stopped").score == 0.4
    directories.write_bytes(f"{uri}/trials/000/checkpoints/step-00000002/weights", b"heavy")
    directories.write_bytes(f"{uri}/trials/000/log.txt", b"said")

    there = tmp_path / "there"
    whole = RunMirror(uri, there)
    remote_ledger.restore_ledger(whole, START_FILES, ("trials",))
    assert not there.exists(), "without its configuration it is no sweep"
    directories.write_bytes(f"{uri}/sweep.yaml", b"{}")
    remote_ledger.restore_ledger(whole, START_FILES, ("trials",))
    assert (there / "trials/proposed.jsonl").read_text() == '{"lr": 1}\n'
    again = LedgerEntry(here.trial, there / "trials/000", here.mirror)
    settled = again.load_settled()
    assert (settled.status, settled.score, settled.step) == ("stopped", 0.4, 4)
    assert settled.run_id == "known"
    assert settled.log.read_text() == "said"
    assert not (again.folder / "checkpoints").exists()


def test_driver_files_are_kept_and_trial_logs_are_downloaded(object_store, tmp_path):
    uri = f"{object_store.uri}/sweep/trials/000"
    here = trial_at(tmp_path / "000", uri)
    assert here.mirror is not None
    here.add_report({"step": 1, "score": 0.5, "scores": {}})
    (here.folder / "log.txt").write_text("of an earlier attempt")
    directories.write_bytes(f"{uri}/reports.jsonl", b"")
    directories.write_bytes(f"{uri}/log.txt", b"of this one")
    result = {"run": "/elsewhere/000", "model": "/elsewhere/000/model", "step": 1, "seconds": 1.0}
    result |= {"name": "000", "evaluation": []}
    directories.write_bytes(f"{uri}/result.json", json.dumps(result).encode())
    remote_ledger.fetch_trial(here.mirror)
    assert len(read_reports(here.folder)) == 1
    assert (here.folder / "log.txt").read_text() == "of this one"
    finished = here.build_outcome("finished").result
    assert finished["model"] == str(here.folder / "model")


def test_a_failure_is_cleared_on_disk_and_in_the_store(object_store, tmp_path):
    uri = f"{object_store.uri}/sweep/trials/000"
    here = trial_at(tmp_path / "000", uri)
    (here.folder / "config.yaml").write_text("{}")
    write_json(here.folder / "error.txt", "Traceback")
    here.settle("failed", "it broke")
    assert directories.object_exists(f"{uri}/outcome.json")
    here.clear_failure()
    assert not directories.object_exists(f"{uri}/outcome.json")
    assert not (here.folder / "error.txt").exists()


def test_a_sweep_resolves_its_directory_and_mirror(run_root: Path, tmp_path: Path) -> None:
    config, folder, mirror = _resolve_config(
        SweepConfig(name="a", run_dir="s3://bucket/runs", space=SPACE)
    )
    assert (folder, config.run_dir) == (run_root / "a", "s3://bucket/runs")
    assert mirror.uri == "s3://bucket/runs/a"
    _, folder, mirror = _resolve_config(
        SweepConfig(name="a", run_dir=f"file://{tmp_path}/b", space=SPACE)
    )
    assert (folder, mirror) == (tmp_path / "b/a", None)
    run = FinetuneConfig(storage=StorageConfig(mirror="s3://bucket/runs"))
    with pytest.raises(UserError, match="give the sweep --run_dir"):
        _resolve_config(SweepConfig(run=run, space=SPACE))
