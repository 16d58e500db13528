"""Versions, aliases and the gate between them; and models found again, or a message why not."""

import dataclasses
import http.server
import json
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.serving import registration
from skillnet_platform import tracking
from skillnet_platform.errors import UserError
from skillnet_platform.secret_uri import SecretUri
from skillnet_platform.tracking import backend, champion, registry, version_reader
from skillnet_platform.tracking.backend import sqlite_path, sqlite_uri
from skillnet_platform.tracking.champion import MetricEstimate
from tests.helpers.tracked_runs import find_champion, load_registered

CODE = """
import json
import mlflow

class Counter(mlflow.pyfunc.PythonModel):
    def load_context(self, context):
        with open(context.artifacts["model"] + "/offset.json") as stream:
            self.offset = json.load(stream)

    def predict(self, context, model_input, params=None):
        return [len(text) + self.offset for text in model_input["text"]]

mlflow.models.set_model(Counter())
"""


def accuracy(value: float, half: float = 0.02, **more: Any) -> MetricEstimate:
    return MetricEstimate("accuracy", value, value - half, value + half, **more)


def error(value: float, half: float = 0.02) -> MetricEstimate:
    return MetricEstimate(
        "token_error_rate", value, value - half, value + half, higher_is_better=False
    )


@pytest.mark.parametrize(
    ("challenger", "passes", "says"),
    [
        ({"a": accuracy(0.6), "b": error(0.2)}, True, "a: better"),
        ({"a": accuracy(0.5), "b": error(0.1)}, True, "b: better"),
        ({"a": accuracy(0.49), "b": error(0.1)}, True, "a: no difference"),
        ({"a": accuracy(0.5), "b": error(0.2)}, False, "better on no task"),
        ({"a": accuracy(0.6), "b": error(0.3)}, False, "b: worse"),
        ({"a": accuracy(0.9)}, False, "b: missing"),
        ({"a": accuracy(0.5), "b": error(0.2), "c": accuracy(0.1)}, True, "c: new"),
        ({"a": accuracy(0.9, data="other"), "b": error(0.2)}, False, "measured on other data than"),
        ({"a": error(0.1), "b": error(0.2)}, False, "measured by another metric than"),
        ({"a": accuracy(0.525), "b": error(0.2)}, False, "a: no difference"),
        # A test of one held-out unit has no interval.
        ({"a": accuracy(0.9, float("nan")), "b": error(0.2)}, False, "against 0.5, no interval"),
    ],
)
def test_the_gate(challenger: dict[str, MetricEstimate], passes: bool, says: str) -> None:
    before = {"a": accuracy(0.5), "b": error(0.2)}
    verdict = champion.decide_promotion(challenger, before)
    assert verdict.passed is passes
    assert says in str(verdict)


def test_a_champion_on_other_data_is_named_with_the_way_to_replace_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = {"a": accuracy(0.8), "b": error(0.2)}
    for figures, is_said in (
        ({"a": accuracy(0.9, data="other"), "b": error(0.2)}, True),
        ({"a": accuracy(0.8), "b": error(0.2)}, False),
    ):
        verdict = champion.decide_promotion(figures, before)
        # A call after a kill has the reasons from the version's tag.
        stored = champion.PromotionDecision(False, tuple(str(verdict).split("; ")))
        for known in (verdict, stored):
            made = registry.RegisteredVersion("s", 2, "models:/s/2", "run", "challenger", known)
            registration._warn_if_incomparable(made, "my-run")
            said = capsys.readouterr().err
            assert ("models:/s/2: not promoted. a: measured on other data" in said) == is_said
            assert ("skillnet register my-run --force true" in said) == is_said
    made = dataclasses.replace(made, alias="champion", verdict=stored)
    registration._warn_if_incomparable(made, "my-run")
    assert not capsys.readouterr().err


def test_an_interval_that_leans_is_used_on_the_side_that_counts() -> None:
    old = MetricEstimate("accuracy", 0.50, 0.49, 0.59)
    assert not champion.decide_promotion(
        {"a": MetricEstimate("accuracy", 0.56, 0.55, 0.57)}, {"a": old}
    ).passed
    mirrored = MetricEstimate("accuracy", 0.50, 0.41, 0.51)
    assert champion.decide_promotion(
        {"a": MetricEstimate("accuracy", 0.56, 0.55, 0.57)}, {"a": mirrored}
    ).passed


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # MLflow decodes such a name where it expects a URI.
    place = tmp_path_factory.mktemp("model") / "50%25 of? a#b ü"
    (place / "weights").mkdir(parents=True)
    (place / "serving.py").write_text(CODE)
    (place / "weights" / "offset.json").write_text("5")
    return place


@pytest.fixture(scope="module")
def run(session_root: Path) -> Iterator[tracking.Tracker]:
    where = tracking.TrackingConfig(experiment="registry", system_metrics=False)
    with tracking.start_run("trained", None, where) as tracker:
        yield tracker


def put(
    run: tracking.Tracker, files: Path, name: str, value: float, system: str = "skillnet"
) -> registry.RegisteredVersion:
    return registry.register_version(
        run.run_id,
        files / "serving.py",
        {"model": files / "weights"},
        {"a": accuracy(value)},
        uri=run.uri,
        name=name,
        metadata={"tasks": ["a"]},
        tags={"seed": 1, "system": system},
        description="**trained** on a",
    )


def aliases(run: tracking.Tracker, name: str) -> dict[str, int]:
    found = backend.create_client(run.uri).get_registered_model(name).aliases
    return {alias: int(version) for alias, version in found.items()}


def test_versions_earn_their_alias(run: tracking.Tracker, files: Path) -> None:
    name = "aliases"
    first = put(run, files, name, 0.50)
    assert (first.version, first.alias, first.uri) == (1, "champion", "models:/aliases/1")
    second = put(run, files, name, 0.51)
    assert (second.version, second.alias) == (2, "challenger")
    assert aliases(run, name) == {"champion": 1, "challenger": 2}
    third = put(run, files, name, 0.60)
    assert third.alias == "champion"
    assert aliases(run, name) == {"champion": 3, "challenger": 2}
    client = backend.create_client(run.uri)
    tags = client.get_model_version(name, "2").tags
    assert "better on no task" in tags["gate"]
    assert tags["seed"] == "1"
    assert not champion.promote_version(1, name=name, uri=run.uri).passed
    assert champion.promote_version(2, name=name, uri=run.uri, force=True).passed
    assert aliases(run, name) == {"champion": 2, "challenger": 1}
    assert client.get_run(run.run_id).info.status == "RUNNING", "registering does not end the run"


def test_what_is_loaded_predicts_as_what_was_put(run: tracking.Tracker, files: Path) -> None:
    import pandas as pd

    made = put(run, files, "loaded", 0.5)
    rows = pd.DataFrame({"text": ["abc", "红色的心"]})
    for uri in ("models:/loaded@champion", made.uri):
        assert load_registered(uri, run.uri).predict(rows) == [8, 9]
    client = backend.create_client(run.uri)
    uploaded = client.get_model_version("loaded", "1").source.removeprefix("models:/")
    assert client.get_logged_model(uploaded).name == "skillnet", "named after its system"
    resolved = registry.resolve_registered("models:/loaded@champion", run.uri)
    assert resolved.version == 1
    assert resolved.run_id == run.run_id
    pickles = [path for path in resolved.path.rglob("*") if path.suffix in (".pkl", ".pickle")]
    assert pickles == []
    assert (resolved.path / "MLmodel").is_file()


def test_a_version_below_a_root_with_special_characters_is_found(
    tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SKILLNET_HOME", str(tmp_path / "50%25 of? a#b ü"))
    where = tracking.TrackingConfig(system_metrics=False)
    with tracking.start_run("odd", None, where) as run:
        put(run, files, "odd", 0.5)
        resolved = registry.resolve_registered("models:/odd@champion", run.uri)
    assert resolved.path.is_relative_to(tmp_path)
    assert list(resolved.path.rglob("offset.json"))


def without_mlflow(*_: Any) -> Any:
    raise AssertionError("MLflow was asked")


@pytest.mark.parametrize("location", ["database-folder", "file"])
def test_a_version_in_a_database_is_read_without_mlflow(
    location: str, run: tracking.Tracker, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"quick-{location}"
    put(run, files, name, 0.5)
    if location == "file":
        folder = registry.resolve_registered(f"models:/{name}/1", run.uri).path
        with sqlite3.connect(sqlite_path(run.uri)) as database:
            database.execute(
                "UPDATE model_versions SET storage_location = ? WHERE name = ?",
                (folder.as_uri(), name),
            )
    for address in (f"models:/{name}@champion", f"models:/{name}/1"):
        with monkeypatch.context() as patch:
            patch.setattr(version_reader, "read_version", lambda *_: None)
            by_mlflow = registry.resolve_registered(address, run.uri)
        with monkeypatch.context() as patch:
            patch.setattr(backend, "create_client", without_mlflow)
            assert registry.resolve_registered(address, run.uri) == by_mlflow
            (weights,) = by_mlflow.path.rglob("offset.json")
            weights.write_text("6")
            with pytest.raises(UserError, match="was altered after its registration"):
                registry.resolve_registered(address, run.uri)
            weights.write_text("5")


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE alembic_version SET version_num = 'abc'",
        "UPDATE model_versions SET status = 'PENDING_REGISTRATION'",
        "UPDATE model_versions SET current_stage = 'Deleted_Internal'",
        "UPDATE model_versions SET workspace = 'other'",
        "UPDATE model_versions SET storage_location = 's3://bucket/model'",
        "UPDATE model_versions SET storage_location = 'database-folder:/../model'",
        "UPDATE model_versions SET storage_location = 'file://other-machine/model'",
        "DELETE FROM registered_model_aliases",
        "DROP TABLE model_version_tags",
        "",
    ],
)
def test_an_unexpected_database_is_left_to_mlflow(
    change: str, run: tracking.Tracker, files: Path, tmp_path: Path
) -> None:
    if find_champion(name="expected", uri=run.uri) is None:
        put(run, files, "expected", 0.5)
    copied = tmp_path / "mlflow.db"
    # The folder of the artifacts is beside the database.
    (tmp_path / "mlartifacts").symlink_to(sqlite_path(run.uri).parent / "mlartifacts")
    shutil.copyfile(sqlite_path(run.uri), copied)
    if change:
        with sqlite3.connect(copied) as database:
            database.execute("PRAGMA foreign_keys = OFF")
            database.execute(change)
    found = version_reader.read_version(SecretUri(sqlite_uri(copied)), "models:/expected@champion")
    assert (found is None) == bool(change)


@pytest.mark.parametrize(
    "model",
    [
        "models:/m-0123",
        "models:/a@latest",
        "models:/a@Latest",
        "models:/a/latest",
        "models:/a",
        "models:/a%41@b",
        "runs:/a/model",
        "models:/a/1/weights",
    ],
)
def test_an_address_with_a_meaning_of_mlflow_is_left_to_it(
    model: str, run: tracking.Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(version_reader, "_read_row", without_mlflow)
    assert version_reader.read_version(SecretUri(run.uri), model) is None


class VersionPages(http.server.BaseHTTPRequestHandler):
    """Pages of an MLflow server about one version."""

    server: Any

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        status, document = self.server.answer
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(document).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def pages() -> Iterator[Any]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), VersionPages) as server:
        server.asked = []  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, None),
        ({"USERNAME": "ann", "PASSWORD": "é"}, "Basic YW5uOsOp"),
        ({"USERNAME": "ann", "PASSWORD": "é", "TOKEN": "t"}, "Basic YW5uOsOp"),
        ({"USERNAME": "ann", "TOKEN": "t"}, "Bearer t"),
    ],
)
def test_a_server_is_asked_once_and_a_download_is_kept(
    given: dict[str, str],
    expected: str | None,
    pages: Any,
    run: tracking.Tracker,
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if find_champion(name="remote", uri=run.uri) is None:
        put(run, files, "remote", 0.5)
    local = registry.resolve_registered("models:/remote@champion", run.uri)
    version = backend.create_client(run.uri).get_model_version("remote", "1")
    tags = [{"key": key, "value": value} for key, value in version.tags.items()]
    about = {"version": "1", "run_id": run.run_id, "status": "READY", "tags": tags}
    pages.answer = (200, {"model_version": about})
    for name, value in given.items():
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", value)
    monkeypatch.setenv("SKILLNET_HOME", str(tmp_path))
    monkeypatch.setattr(backend, "create_client", lambda _: None)
    downloads: list[str] = []

    def download(artifact_uri: str, dst_path: str) -> None:
        downloads.append(artifact_uri)
        shutil.copytree(local.path, dst_path, dirs_exist_ok=True)

    monkeypatch.setattr("mlflow.artifacts.download_artifacts", download)
    uri, address = f"http://127.0.0.1:{pages.server_port}", "models:/remote@champion"
    first = registry.resolve_registered(address, uri)
    assert (first.version, first.run_id) == (1, run.run_id)
    assert first.path.is_relative_to(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(backend, "create_client", without_mlflow)
        assert registry.resolve_registered(address, uri) == first
    (path, authorization), _ = pages.asked
    assert path == "/api/2.0/mlflow/registered-models/alias?name=remote&alias=champion"
    assert authorization == expected
    # A damaged download is replaced.
    (weights,) = first.path.rglob("offset.json")
    weights.write_text("6")
    assert registry.resolve_registered(address, uri) == first
    assert weights.read_text() == "5"
    assert downloads == [address] * 2


@pytest.mark.parametrize(
    ("answer", "variable"),
    [
        ((404, {"error_code": "RESOURCE_DOES_NOT_EXIST"}), ""),
        ((302, {}), ""),
        ((200, {"model_version": {"version": "1", "status": "FAILED_REGISTRATION"}}), ""),
        ((200, []), ""),
        ((200, {"model_version": {"version": "1", "status": "READY"}}), "MLFLOW_TRACKING_AUTH"),
        ((200, {"model_version": {"version": "1", "status": "READY"}}), "MLFLOW_WORKSPACE"),
    ],
)
def test_an_unexpected_answer_of_a_server_is_left_to_mlflow(
    answer: Any, variable: str, pages: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages.answer = answer
    if variable:
        monkeypatch.setenv(variable, "given")
    uri = SecretUri(f"http://127.0.0.1:{pages.server_port}")
    assert version_reader.read_version(uri, "models:/a@b") is None
    assert bool(pages.asked) == (not variable)


def test_a_folder_is_a_model_too(files: Path) -> None:
    found = registry.resolve_registered(str(files))
    assert (found.path, found.version) == (files, None)


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("models:/present/9", "present has versions [1] and aliases @champion (1)"),
        ("models:/present@chmpion", "aliases @champion (1)"),
        ("models:/presemt@champion", "did you mean 'present'?"),
        ("models:/present", "models:/present@champion"),
        ("runs:/0123456789abcdef0123456789abcdef/model", "not found"),
        ("no/such/folder", "no such directory"),
    ],
)
def test_a_model_that_is_not_there_is_named(
    run: tracking.Tracker, files: Path, uri: str, says: str
) -> None:
    if find_champion(name="present", uri=run.uri) is None:
        put(run, files, "present", 0.5)
    with pytest.raises(UserError) as caught:
        registry.resolve_registered(uri, run.uri)
    assert says in str(caught.value)
    assert uri in str(caught.value)


def test_models_of_two_systems_are_never_versions_of_one_model(
    run: tracking.Tracker, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "systems"
    put(run, files, name, 0.5)
    with pytest.raises(champion.OtherSystemError, match="such as skillnet-dense"):
        put(run, files, name, 0.9, "dense")
    assert aliases(run, name) == {"champion": 1}
    # Two machines can register at once, so the promotion compares the systems too.
    monkeypatch.setattr(champion, "check_system", lambda *_: None)
    late = put(run, files, name, 0.9, "dense")
    assert (late.version, late.alias) == (2, "challenger")
    assert str(late.verdict) == "system: dense is not compared with the champion, a skillnet model"
    with pytest.raises(champion.OtherSystemError, match="version 1 is a skillnet model"):
        champion.promote_version(2, name=name, uri=run.uri, force=True)
    assert aliases(run, name) == {"champion": 1, "challenger": 2}


@pytest.mark.parametrize(
    ("system", "experiment", "expected"),
    [
        ("skillnet", None, "skillnet"),
        ("dense", None, "skillnet-dense"),
        ("skillnet", "clue", "clue"),
        ("moe", "team/clue:1", "team-clue-1-moe"),
    ],
)
def test_a_registered_model_has_one_system_and_one_experiment(
    system: str, experiment: str | None, expected: str
) -> None:
    assert champion.choose_model_name(system, experiment) == expected


def test_a_missing_artefact_is_named_before_anything_is_logged(run: tracking.Tracker) -> None:
    with pytest.raises(UserError, match=r"absent\.py: no such file"):
        registry.register_version(run.run_id, "absent.py", {}, {}, uri=run.uri, name="never")
    assert find_champion(name="never", uri=run.uri) is None


def test_the_process_keeps_its_own_mlflow_settings(
    run: tracking.Tracker, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "123")
    put(run, files, "settings", 0.5)
    assert os.environ["MLFLOW_EXPERIMENT_ID"] == "123"
    assert "MLFLOW_TRACKING_URI" not in os.environ


def test_the_same_registration_is_one_version(run: tracking.Tracker, files: Path) -> None:
    made = [
        registry.register_version(
            run.run_id,
            files / "serving.py",
            {"model": files / "weights"},
            {"a": accuracy(0.5)},
            uri=run.uri,
            name="once",
            key="the same",
        )
        for _ in range(2)
    ]
    assert made[0] == made[1]


def test_an_upload_that_arrives_altered_is_rejected_and_leaves_nothing(
    run: tracking.Tracker, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    upload = LocalArtifactRepository.log_artifacts

    places: list[Path] = []

    def damage(self: Any, local_dir: str, artifact_path: str | None = None) -> None:
        upload(self, local_dir, artifact_path)
        places.append(Path(self.artifact_dir))
        for path in Path(self.artifact_dir).rglob("offset.json"):
            path.write_text("6")

    monkeypatch.setattr(LocalArtifactRepository, "log_artifacts", damage)
    with pytest.raises(UserError, match=r"offset\.json arrived altered"):
        put(run, files, "damaged", 0.5, "damaged")
    client = backend.create_client(run.uri)
    assert list(client.search_model_versions("name = 'damaged'")) == []
    experiment = client.get_run(run.run_id).info.experiment_id
    assert [m for m in client.search_logged_models([experiment]) if m.name == "damaged"] == []
    assert places
    assert [path for path in places if path.exists()] == [], "MLflow keeps files of deleted models"


def test_files_that_are_not_the_registered_ones_are_rejected(
    run: tracking.Tracker, files: Path
) -> None:
    made = put(run, files, "altered", 0.5, "altered")
    client = backend.create_client(run.uri)
    found = client.get_model_version("altered", "1")
    path = registry.resolve_registered(made.uri, run.uri).path
    [weights] = path.rglob("offset.json")
    weights.write_text("6")
    for uri in (made.uri, "models:/altered@champion", found.source, f"runs:/{run.run_id}/altered"):
        with pytest.raises(UserError, match="was altered after its registration"):
            load_registered(uri, run.uri)
    weights.write_text("5")
    client.delete_model_version_tag("altered", "1", "files_sha256")
    with pytest.raises(UserError, match="no digest of its files"):
        registry.resolve_registered(made.uri, run.uri)


@pytest.mark.parametrize("write", ["set_model_version_tag", "set_registered_model_alias"])
def test_a_champion_that_another_machine_sets_meanwhile_is_compared(
    write: str, run: tracking.Tracker, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sets the alias after the decision, before or after the alias is written here."""
    from mlflow import MlflowClient

    name = f"race-{write}"
    put(run, files, name, 0.5)
    put(run, files, name, 0.7)
    other = backend.create_client(run.uri)
    other.set_registered_model_alias(name, "champion", "1")
    written, set_alias = getattr(MlflowClient, write), MlflowClient.set_registered_model_alias

    def meanwhile(self: Any, *args: Any, **options: Any) -> None:
        written(self, *args, **options)
        if "3" in args:
            set_alias(other, name, "champion", "2")

    monkeypatch.setattr(MlflowClient, write, meanwhile)
    assert put(run, files, name, 0.6).alias == "challenger"
    assert aliases(run, name) == {"champion": 2, "challenger": 3}


def test_a_version_waits_for_an_earlier_one_of_another_machine(
    run: tracking.Tracker,
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    put(run, files, "queue", 0.5)
    client = backend.create_client(run.uri)
    client.set_model_version_tag("queue", "1", champion.STATE_TAG, "pending")
    client.set_model_version_tag("queue", "1", backend.PROCESS_TAG, "elsewhere:boot:1:2:3")
    monkeypatch.setattr(champion, "EARLIER_PATIENCE_S", 1.0)
    put(run, files, "queue", 0.6)
    assert "waiting for the registration of version 1" in capsys.readouterr().err
    state = client.get_model_version("queue", "1").tags[champion.STATE_TAG]
    assert state == "abandoned", "the next version does not wait for it again"
