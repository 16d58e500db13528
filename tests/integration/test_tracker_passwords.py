"""A tracked run whose URI holds a password: nothing that it writes shows the password."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines import finetune
from skillnet_platform import config as configuration
from skillnet_platform.secret_uri import SecretUri
from skillnet_platform.tracking import backend
from tests.helpers.readable_corpora import write_corpora
from tests.helpers.small_corpora import small_config
from tests.integration.test_tracking_server import ROOT, served

pytestmark = pytest.mark.integration

COMMAND = [sys.executable, "-m", "skillnet_platform.cli", "finetune"]


@pytest.fixture(scope="module")
def server_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def tracker(server_home: Path) -> Iterator[SecretUri]:
    """The URI of a server with authentication, complete with its password."""
    pytest.importorskip("flask_wtf", reason="needs Flask-WTF: pip install '.[tracker]'")
    with served("--auth", "true", home=server_home) as address:
        password = (server_home / "tracker/admin-password").read_text().strip()
        yield SecretUri(address.replace("://", f"://admin:{password}@"))


def holders(folder: Path, secret: str) -> list[str]:
    """The files below a folder that hold a text, or are named by it."""
    found = []
    for path in folder.rglob("*"):
        in_file = path.is_file() and secret.encode() in path.read_bytes()
        if in_file or secret in path.name:
            found.append(str(path.relative_to(folder)))
    return sorted(found)


def test_no_file_no_parameter_and_no_output_of_a_run_holds_the_password(
    tracker: SecretUri, server_home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    secret = tracker.reveal().partition("admin:")[2].partition("@")[0]
    home = tmp_path / "runs"
    config = small_config(write_corpora(tmp_path / "data"), steps=6, log_every=1)
    config.model.vocab_size = 1200
    config.name, config.evaluate, config.tracking.register = "secretive", True, True
    path = tmp_path / "run.yaml"
    path.write_text(configuration.to_yaml(config), encoding="utf-8")
    done = subprocess.run(
        [*COMMAND, "--config", str(path), "--tracking.uri", tracker.reveal()],
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}",
            "SKILLNET_HOME": str(home),
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
        },
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert secret not in done.stdout + done.stderr
    assert "other users of this machine can read command lines" in done.stderr
    assert holders(tmp_path, secret) == []
    assert f"uri: {tracker}" in (home / "secretive/config.yaml").read_text(encoding="utf-8")

    client = backend.create_client(tracker)
    run_id = configuration.load_yaml(home / "secretive/run.json")["run_id"]
    run = client.get_run(run_id)
    assert run.data.params["tracking.uri"] == str(tracker)
    assert secret not in repr(run.to_dictionary())
    for version in client.search_model_versions("name = 'skillnet'"):
        assert secret not in repr(dict(version))
    assert {"loss", "training/learning_rate"} & set(run.data.metrics)
    assert client.search_model_versions("name = 'skillnet'"), "the bundle is among the files"
    assert holders(server_home, secret) == ["tracker/admin-password"]
    # A URI from the written configuration needs the password again, and says so.
    capfd.readouterr()
    words = ["--config", str(home / "secretive/config.yaml"), "--run_dir", str(home)]
    assert finetune.main([*words, "--name", "again"]) == 2
    assert "Set MLFLOW_TRACKING_URI to the complete URI" in capfd.readouterr().err
