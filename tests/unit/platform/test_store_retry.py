"""What failures of Azure and GCS mean, by errors of the shape that their clients raise."""

import base64
import hashlib
from pathlib import Path
from typing import Any

import pytest

from skillnet_platform.errors import UserError
from skillnet_platform.storage import directories
from skillnet_platform.storage.objects import md5_of
from skillnet_platform.storage.retry import explain_refusal, is_transient, retry_transient


class AzureError(Exception):
    """Of azure.core.exceptions."""

    status_code: int | None = None


class HttpResponseError(AzureError):
    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status_code = status


class ResourceNotFoundError(HttpResponseError): ...


class ClientAuthenticationError(AzureError): ...


class ServiceRequestError(AzureError): ...


class HttpError(Exception):
    """Of gcsfs.retry."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


for kind in (AzureError, *AzureError.__subclasses__(), ResourceNotFoundError):
    kind.__module__ = "azure.core.exceptions"
HttpError.__module__ = "gcsfs.retry"


@pytest.mark.parametrize(
    "problem",
    [
        ServiceRequestError("Cannot connect to host 127.0.0.1:10011"),
        HttpResponseError("Server is busy", 503),
        HttpResponseError("slow down", 429),
        HttpError("Service Unavailable", 503),
    ],
)
def test_a_store_that_is_away_is_waited_for(problem: Exception) -> None:
    assert is_transient(problem)
    assert explain_refusal("abfs://skillnet/x", problem) is None
    tries: list[int] = []

    def fail() -> None:
        tries.append(1)
        raise problem

    with pytest.raises(directories.StoreUnavailableError, match="did not answer"):
        retry_transient("abfs://skillnet/x", fail, seconds=0.2)
    assert tries


@pytest.mark.parametrize(
    ("uri", "problem", "hint"),
    [
        ("abfs://c/x", HttpResponseError("Server failed to authenticate", 403), "AZURE_STORAGE_"),
        ("az://c/x", ClientAuthenticationError("no token"), "AZURE_STORAGE_"),
        ("abfs://c/x", ValueError("unable to connect to account for Must …"), "AZURE_STORAGE_"),
        ("gs://b/x", HttpError("Anonymous caller", 401), "GOOGLE_APPLICATION_CREDENTIALS"),
        ("gs://b/x", OSError("Forbidden: b/x"), "GOOGLE_APPLICATION_CREDENTIALS"),
    ],
)
def test_refused_credentials_are_not_tried_again(uri: str, problem: Exception, hint: str) -> None:
    assert not is_transient(problem)
    assert f"refused the credentials ({type(problem).__name__}" in str(
        explain_refusal(uri, problem)
    )
    assert hint in str(explain_refusal(uri, problem))


def test_a_missing_container_is_distinguished_from_a_missing_object() -> None:
    uri = "abfs://mine@account.dfs.core.windows.net/x"
    absent = ResourceNotFoundError("does not exist. ErrorCode:ContainerNotFound", 404)
    assert "there is no container 'mine'" in str(explain_refusal(uri, absent))

    def blob() -> None:
        raise ResourceNotFoundError("The blob does not exist. ErrorCode:BlobNotFound", 404)

    with pytest.raises(FileNotFoundError, match=r"mine@account"):
        retry_transient(uri, blob)


def test_a_request_that_cannot_be_right_is_a_message() -> None:
    def bad_name() -> None:
        raise HttpResponseError("The specified resource name contains invalid characters", 400)

    with pytest.raises(UserError, match=r"refused the request.*invalid characters"):
        retry_transient("abfs://UPPER/x", bad_name)


def test_the_clients_own_classes_have_that_shape() -> None:
    azure = pytest.importorskip("azure.core.exceptions")
    assert is_transient(azure.ServiceRequestError("away"))
    assert not is_transient(azure.ClientAuthenticationError("no"))
    retry = pytest.importorskip("gcsfs.retry")
    assert is_transient(retry.HttpError({"code": 503, "message": "away"}))
    assert not is_transient(retry.HttpError({"code": 401, "message": "no"}))


@pytest.mark.parametrize("known", ["s3", "gs", "abfs"])
def test_what_is_known_to_be_there_is_not_sent_again(
    known: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = hashlib.md5(b"content", usedforsecurity=False).digest()
    reported: dict[str, dict[str, Any]] = {
        "s3": {"ETag": f'"{digest.hex()}"'},
        "gs": {"md5Hash": base64.b64encode(digest).decode(), "etag": "CAE="},
        "abfs": {"content_settings": {"content_md5": bytearray(digest)}, "etag": "0x8D"},
    }
    assert md5_of(reported[known]) == digest
    monkeypatch.setattr(directories, "info_of", lambda _: reported[known])
    (tmp_path / "a").write_bytes(b"content")
    assert directories._is_there("x://b/a", tmp_path / "a")
    (tmp_path / "a").write_bytes(b"another")
    assert not directories._is_there("x://b/a", tmp_path / "a")


@pytest.mark.parametrize(
    "info",
    [{}, {"ETag": '"abc-2"'}, {"content_settings": {"content_md5": None}}, {"etag": "0x8D"}],
)
def test_a_store_that_gives_no_digest_is_sent_again(info: dict[str, Any]) -> None:
    assert md5_of(info) is None
