"""The list of runs shows what tells runs apart, and a moved run root keeps its artifacts."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import pytest

from pipelines.training.config.run import PretrainConfig
from skillnet_platform import tracking
from skillnet_platform.tracking import backend, source_commit
from skillnet_studies.config.study import StudyConfig
from sweeps.config.sweep import SweepConfig
from tests.helpers.processes import fork_context, run_python
from tests.helpers.tracked_runs import run_of, where

ROOT = Path(__file__).parents[3]


def test_a_run_records_the_commit_of_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(source_commit.COMMIT_VARIABLE, raising=False)
    source_commit.read_commit.cache_clear()
    with tracking.start_run("commit", None, where()) as tracker:
        pass
    tags = run_of(tracker).data.tags
    words = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    head = subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    assert tags.get("mlflow.source.git.commit", "") == head


def test_a_job_records_the_commit_of_its_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(source_commit.COMMIT_VARIABLE, "ab12+")
    assert source_commit.commit_variable() == {source_commit.COMMIT_VARIABLE: "ab12+"}
    assert source_commit.commit_tags() == {
        "mlflow.source.git.commit": "ab12",
        "skillnet.git.modified": "true",
    }


def test_the_repository_around_an_ignored_folder_is_not_its_commit(tmp_path: Path) -> None:
    for words in (["init", "-q"], ["config", "user.email", "a@b"], ["config", "user.name", "a"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "module.py").touch()
    (tmp_path / "config.yaml").touch()
    for words in (["add", "config.yaml"], ["commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    source_commit.read_commit.cache_clear()
    assert source_commit.read_commit(tmp_path / "venv") == ""
    assert len(source_commit.read_commit(tmp_path)) == 40
    source_commit.read_commit.cache_clear()
    (tmp_path / "config.yaml").write_text("a: 1")
    assert source_commit.read_commit(tmp_path).endswith(source_commit.MODIFIED_MARK)


def test_the_list_of_runs_opens_with_system_tasks_and_score() -> None:
    backend.setup_backend(experiment="listed")
    place = backend.setup_backend(experiment="listed")
    client = backend.create_client(place.uri)
    tags = client.get_experiment(place.experiment_id).tags
    shown = json.loads(tags["mlflow.sharedViewState.skillnet"])["selectedColumns"]
    assert shown[:3] == ["tags.`system`", "tags.`tasks`", "metrics.`score`"]
    assert tags["mlflow.experiment.primaryMetric.name"] == "score"
    link = backend.run_list_link("http://host", place.experiment_id)
    assert f"/experiments/{place.experiment_id}/runs?viewStateShareKey=skillnet&" in link
    # Of an experiment that another program made.
    own = {"mlflow.note.content": "mine", "mlflow.experiment.primaryMetric.name": "loss"}
    other = client.create_experiment("foreign", tags=own)
    backend.setup_backend(experiment="foreign")
    tags = client.get_experiment(other).tags
    assert own.items() <= tags.items()
    assert "mlflow.sharedViewState.skillnet" in tags


def test_pretraining_sweeps_and_studies_have_their_own_experiments() -> None:
    kinds = (PretrainConfig(), SweepConfig(), StudyConfig(runs=["a"]))
    found = [each.tracking.experiment for each in kinds]
    assert found == ["skillnet-pretraining", "skillnet-sweeps", "skillnet-studies"]


#: Opens a run first: the same calls as every command that trains, merges or registers.
RECORD = """
import sys
from pathlib import Path
from skillnet_platform import tracking
from skillnet_platform.tracking import backend
from skillnet_platform.tracking.champion import registration_turn
where = tracking.TrackingConfig(system_metrics=False)
with tracking.start_run("there", None, where, record=Path(sys.argv[1])) as tracker:
    tracker.text("new", "new.txt")
    with registration_turn(tracker.uri, "model"), registration_turn(tracker.uri, "model"):
        client = backend.create_client(tracker.uri)
        client.download_artifacts(tracker.run_id, "note.txt", ".")
print(client.get_run(tracker.run_id).info.artifact_uri)
"""


def record_in(root: Path, folder: Path, record: str, answers: "SimpleQueue[str]") -> None:
    os.environ["SKILLNET_HOME"] = str(root)
    os.chdir(folder)
    sys.argv[1:] = [record]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(RECORD, {})  # noqa: S102
    answers.put(printed.getvalue())


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["copied", "moved", "linked", "mounted", "mounted read-only"])
def test_a_command_runs_in_a_run_root_of_another_path(
    kind: str, run_root: Path, tmp_path: Path
) -> None:
    record = tmp_path / "run.json"
    with tracking.start_run("here", None, where(), record=record) as tracker:
        tracker.text("kept", "note.txt")
    there = tmp_path / "a 50% ü root"
    if kind == "copied":
        shutil.copytree(run_root, there)
    elif kind == "moved":
        run_root.rename(there)
    elif kind == "linked":
        there.symlink_to(run_root)
    if kind.startswith("mounted"):
        # As in a container: the folder at its new path only.
        there.mkdir()
        hide = f"mount --bind {run_root} '{there}' && mount -t tmpfs none {run_root}"
        if kind == "mounted read-only":
            hide += f" && mount -o remount,ro,bind '{there}'"
        if subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
            pytest.skip("this machine lets no user make namespaces")
        done = run_python(
            *("-c", RECORD, str(record)),
            before=["unshare", "-rm", "sh", "-c", f'{hide} && exec "$@"', "sh"],
            variables={"SKILLNET_HOME": str(there)},
            cwd=tmp_path,
        )
        if kind == "mounted read-only":
            said = done.stderr.splitlines()[-1]
            assert f"UserError: {there / 'mlflow.db'}: the database is read-only. Make it" in said
            return
        assert done.returncode == 0, done.stderr
        printed = done.stdout
    else:
        forks = fork_context()
        answers = forks.SimpleQueue()
        process = forks.Process(target=record_in, args=(there, tmp_path, str(record), answers))
        process.start()
        process.join(120)
        assert process.exitcode == 0
        printed = answers.get()
    assert printed.strip() == f"database-folder:/mlartifacts/{tracker.run_id}/artifacts"
    assert kind != "moved" or not run_root.exists(), "the old location is not made again"
    assert (tmp_path / "note.txt").read_text() == "kept"
    kept_in = run_root if kind == "mounted" else there
    stored = kept_in / "mlartifacts" / tracker.run_id / "artifacts" / "new.txt"
    assert stored.read_text() == "new"
