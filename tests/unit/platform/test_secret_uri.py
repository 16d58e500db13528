"""Secrets of URIs appear in no text that is made of them."""

import copy
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.data.io.directory import SourceDirectory
from pipelines.training.config.run import StorageConfig
from skillnet_cluster import doctor, submit, tracker
from skillnet_cluster.checks import Finding
from skillnet_platform import config, console
from skillnet_platform.cluster import connect
from skillnet_platform.errors import UserError, first_line
from skillnet_platform.secret_uri import SecretUri, redact_secrets
from skillnet_platform.storage import directories, location
from skillnet_platform.tracking import TrackingConfig, backend
from skillnet_platform.tracking import run as tracking_run
from skillnet_studies.report.report import describe_command

SECRET = "Hu7-s3cret"  # noqa: S105 - made up


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://me:{}@host:5000", "http://***@host:5000"),
        ("https://me:{}@host/mlflow/", "https://***@host/mlflow/"),
        ("http://{}@host", "http://***@host"),
        ("http://{}:@host:5000/a", "http://***@host:5000/a"),
        ("https://{}:x-oauth-basic@host", "https://***@host"),
        ("http://me:a@{}@host", "http://***@host"),
        ("http://:{}@host", "http://***@host"),
        ("http://me:a/{}@host", "http://***@host"),
        ("http://me:a#{}@host", "http://***@host"),
        ("http://me:12?{}@host", "http://***@host"),
        ("http://me:{}", "http://***"),
        ("HTTP://{}@host", "HTTP://***@host"),
        ("ray://{}@head:10001", "ray://***@head:10001"),
        ("redis://{}@host:6379/0", "redis://***@host:6379/0"),
        ("redis://:{}@host:6379/0", "redis://***@host:6379/0"),
        ("postgresql://me:{}@host/runs", "postgresql://me:***@host/runs"),
        ("postgresql://me:a/{}@host/runs", "postgresql://me:***@host/runs"),
        ("postgresql+psycopg://me:a@{}@host/runs", "postgresql+psycopg://me:***@host/runs"),
        (
            "postgresql://host/runs?user=me&password={}",
            "postgresql://host/runs?user=me&password=***",
        ),
        (
            "postgresql://host/runs?host=/run&passfile={}",
            "postgresql://host/runs?host=/run&passfile=***",
        ),
        ("mssql+pyodbc:///?odbc_connect=PWD%3D{}", "mssql+pyodbc:///?odbc_connect=***"),
        ("mssql://host;password={}/x", "mssql://***"),
        ("s3://AKIA:{}@bucket/runs", "s3://***@bucket/runs"),
        ("s3://bucket/runs?{}", "s3://bucket/runs?***"),
        ("sftp://me:{}@host/runs", "sftp://me:***@host/runs"),
        ("https://a.b/x.tar?sv=1&sig={}&se=2", "https://a.b/x.tar?sv=1&sig=***&se=2"),
        ("https://b/x?X-Amz-Signature={}", "https://b/x?X-Amz-Signature=***"),
        ("https://b/x?AWSAccessKeyId={}&v=1", "https://b/x?AWSAccessKeyId=***&v=***"),
        *(
            (f"https://b/x?{name}={{}}", f"https://b/x?{name}=***")
            for name in (
                "access_token",
                "auth",
                "jwt",
                "pass",
                "sas",
                "code",
                "p",
                "SeCrEt",
                "x_y.z",
            )
        ),
        ("https://b/x?{}", "https://b/x?***"),
        ("https://b/x?{}=1", "https://b/x?***"),
        ("https://b/x#access_token={}", "https://b/x#***"),
        ("https://b/x#{}", "https://b/x#***"),
        ("https://b/#/runs/1?token={}", "https://b/#/runs/1?token=***"),
        ("https://b/x?host=me:{}@c", "https://***@c"),
    ],
)
def test_every_text_of_a_uri_lacks_its_secret(uri: str, shown: str) -> None:
    complete = uri.format(SECRET)
    made = SecretUri(complete)
    for text in (str(made), f"{made}", made + "", json.dumps({"uri": made})):
        assert SECRET not in text
    assert str(made) == shown
    assert repr(made) == repr(shown)
    assert made.reveal() == complete
    assert made.has_secret
    assert not made.is_redacted
    assert redact_secrets(f"cannot open '{complete}' (500)") == f"cannot open '{shown}' (500)"


@pytest.mark.parametrize(
    "uri",
    [
        "http://host:5000",
        "http://127.0.0.1:5000/#/experiments/1/runs/2?workflowType=machine_learning",
        "postgresql://mlflow@/mlflow?host=/run/x",
        "abfs://container@account.dfs.core.windows.net/runs",
        "sqlite:////tmp/a@b:c@d/x.db",
        "models:/skillnet@champion",
        "file:///a:b@c",
        "s3://bucket/a@2x.png",
        "hdfs://me@node:9000/runs",
        "sftp://me@host/runs",
        "https://registry.example/@scope/pkg",
        "http://[::1]:5000/x",
        "http://HOST:PORT/x",
        "postgresql://a:5432,b:5432/runs?sslmode=require&target_session_attrs=any",
        "https://huggingface.co/a/b/resolve/main/c.bin?download=true",
    ],
)
def test_a_uri_without_a_secret_is_unchanged(uri: str) -> None:
    made = SecretUri(uri)
    assert str(made) == made.reveal() == uri
    assert not made.has_secret
    assert not made.is_redacted


def test_a_written_uri_is_known_to_lack_its_secret() -> None:
    written = SecretUri(str(SecretUri(f"http://me:{SECRET}@host")))
    assert written.is_redacted
    assert written.with_secret("p@ss/word", "me").reveal() == "http://me:p%40ss%2Fword@host"
    stored = SecretUri(str(SecretUri(f"mysql://me:{SECRET}@host")))
    assert stored.with_secret("p@ss/word").reveal() == "mysql://me:p%40ss%2Fword@host"
    assert SecretUri(f"http://me:{SECRET}@host:1/x").address == "http://host:1/x"


def test_copies_within_a_run_keep_the_secret() -> None:
    made = SecretUri(f"http://me:{SECRET}@host")
    tree = config.to_dict(TrackingConfig(uri=made))
    again = config.build_config(TrackingConfig, tree)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), again.uri):  # noqa: S301
        assert isinstance(other, SecretUri)
        assert other.reveal() == made.reveal()


def test_a_configuration_is_written_without_the_secret(capsys: pytest.CaptureFixture[str]) -> None:
    settings = TrackingConfig(uri=f"http://me:{SECRET}@host")
    written = config.to_yaml(settings)
    console.emit_json(settings)
    shown = [written, repr(settings), config.digest_config(settings), capsys.readouterr().out]
    assert all(SECRET not in text for text in shown)
    assert yaml.safe_load(written)["uri"] == "http://***@host"


def test_messages_lack_the_secrets_of_uris_in_them(capsys: pytest.CaptureFixture[str]) -> None:
    text = f"no answer of http://me:{SECRET}@host"
    for show in (console.print_note, console.print_warning, console.print_error):
        show(text)
    shown = capsys.readouterr().err + first_line(OSError(text))
    assert SECRET not in shown
    assert shown.count("http://***@host") == 4


def test_a_written_uri_gets_its_secret_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    complete = SecretUri(f"http://me:{SECRET}@host:1")
    written = str(complete)
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:other@elsewhere")
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME", raising=False)
    for password in ("", SECRET):
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
        with pytest.raises(UserError, match="files keep no password") as caught:
            backend.resolve_uri(written)
        assert "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in str(caught.value)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    assert backend.resolve_uri(written).reveal() == complete.reveal()
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "another")
    with backend.share_secret(complete):
        assert backend.resolve_uri(written).reveal() == complete.reveal()
    assert os.environ["MLFLOW_TRACKING_URI"] == "http://me:other@elsewhere"


@pytest.mark.parametrize(
    "use",
    [
        lambda uri: location.parse_location(uri, Path()),
        lambda uri: StorageConfig(mirror=uri),
        SourceDirectory,
        directories.read_bytes,
    ],
)
@pytest.mark.parametrize("uri", ["s3://AKIA:{}@bucket/x", "abfs://c@a.b/x?sv=1&sig={}"])
def test_a_location_with_a_secret_is_refused(use: Callable[[str], Any], uri: str) -> None:
    with pytest.raises(UserError, match="manifests and logs") as caught:
        use(uri.format(SECRET))
    assert SECRET not in str(caught.value)


def test_command_lines_with_secrets_are_warned_of_or_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    uri = f"http://me:{SECRET}@host"
    assert tracker.main(["--store", uri, "--port", "0"]) == 2
    shown = capsys.readouterr().err
    assert "other users of this machine can read command lines" in shown
    assert "--store http://***@host: give a database" in shown
    options = submit.SubmitConfig(["finetune", "--tracking.uri", uri])
    with pytest.raises(UserError, match="--env_from MLFLOW_TRACKING_URI") as caught:
        submit.submit_job(None, options)
    assert SECRET not in shown + str(caught.value)


def test_addresses_without_a_host_in_errors_lack_their_secrets() -> None:
    text = f"Max retries exceeded with url: /api?jwt={SECRET}&v=1 (Caused by x)"
    assert redact_secrets(text) == "Max retries exceeded with url: /api?jwt=***&v=*** (Caused by x)"


@pytest.mark.parametrize("uri", ["http://host?jwt={}", "http://host/?{}", "https://host/#{}"])
def test_an_address_of_a_tracker_has_no_query(uri: str) -> None:
    with pytest.raises(UserError, match="MLFLOW_TRACKING_TOKEN") as caught:
        backend.resolve_uri(uri.format(SECRET))
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("address", ["ray://{}@127.0.0.1:1", "http://me:{}@127.0.0.1:1"])
def test_addresses_of_a_cluster_lack_their_secrets(
    address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address.format(SECRET))
    found = [Finding("x", "error", "y", "z")]
    for name in ("check_machine", "_cluster", "_from_inside"):
        monkeypatch.setattr(doctor, name, lambda *given: found)
    assert doctor.main([]) == 1
    shown = str(capsys.readouterr())
    assert f"The cluster of {address.partition('//')[0]}//***@127.0.0.1:1" in shown
    if address.startswith("ray"):
        with pytest.raises(UserError, match="sent to the http:// address") as caught:
            submit.resolve_job_server_url()
        shown += str(caught.value)
    else:
        url = submit.resolve_job_server_url()
        assert SECRET in url.reveal()
        shown += url
        # Another test of this process may have started Ray.
        monkeypatch.setattr("ray.is_initialized", lambda: False)
        with pytest.raises(UserError, match="address of a cluster's job server") as caught:
            connect.ensure_ray()
        shown += str(caught.value)
    assert SECRET not in shown


def test_records_of_the_command_line_lack_its_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["run.py", f"--tracking.uri=http://{SECRET}@host"])
    tag = tracking_run._first_tags(None)["mlflow.source.name"]
    command = describe_command()
    for text in (tag, command):
        assert SECRET not in text
        assert "http://***@host" in text
