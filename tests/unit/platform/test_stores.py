"""Stores: one contract for all kinds, outages that are waited out, and refusals in one message."""

import base64
import hashlib
import itertools
import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from skillnet_platform.errors import UserError
from skillnet_platform.storage import directories
from skillnet_platform.storage.directories import md5_of
from skillnet_platform.storage.location import SyncedFolder
from skillnet_platform.storage.retry import (
    StoreUnavailableError,
    explain_refusal,
    is_transient,
    retry_patience,
    retry_transient,
)
from tests.helpers.object_store import KEYS, ObjectStore, in_environment

every_store = pytest.mark.parametrize(
    "store_uri", ["file", "memory", "s3", "google", "azure"], indirect=True
)
every_client = pytest.mark.parametrize("store_uri", ["s3", "google", "azure"], indirect=True)


def folder(path: Path, **files: bytes) -> Path:
    for name, data in ((files or {"a": b"one", "b": b"two"}) | {"manifest.json": b"{}"}).items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def test_uris() -> None:
    assert directories.is_uri("s3://bucket/a")
    assert directories.is_uri("memory://a")
    for path in (None, "runs/a", "/data", "models:/skillnet@champion", "http://host/a", Path("a")):
        assert not directories.is_uri(path)
    join = directories.join_uri
    assert join("s3://b/a/", "c/", "d.json") == "s3://b/a/c/d.json"
    assert join("s3://b/corpora/x", "../tokenizer.json") == "s3://b/corpora/tokenizer.json"
    assert join("file:///tmp/a", "b") == "file:///tmp/a/b"
    assert join("memory://a", "b") == "memory://a/b"
    with pytest.raises(UserError, match="leads out"):
        join("s3://b/a", "../../other/x")


# -- the contract -----------------------------------------------------------------------------


@every_store
def test_a_folder_goes_up_and_comes_down(store_uri: str, tmp_path: Path) -> None:
    uri, large = f"{store_uri}/x", os.urandom(12_000_000)
    files = {"a b": b"one", "empty": b"", "sub/größe.bin": large}
    mine = folder(tmp_path / "mine", **files)
    assert directories.list_files(uri) == directories.list_folders(uri) == []
    assert not directories.is_committed(uri)
    with pytest.raises(FileNotFoundError):
        directories.read_bytes(f"{uri}/none")
    directories.remove_file(f"{uri}/none")

    assert directories.put_directory(mine, uri)
    assert directories.is_committed(uri)
    assert not directories.put_directory(mine, uri), "it is there already"
    names = {name: len(data) for name, data in files.items()} | {"manifest.json": 2}
    listed = [(entry.name, entry.bytes) for entry in directories.list_files(uri)]
    assert listed == sorted(names.items())
    assert (directories.list_folders(store_uri), directories.list_folders(uri)) == (["x"], ["sub"])
    with directories.open_file(f"{uri}/sub/größe.bin") as stream:
        stream.seek(7_000_000)
        assert stream.read(100) == large[7_000_000:7_000_100]

    copied: list[str] = []
    directories.copy_files(uri, f"{store_uri}/y", names, copied.append)
    assert sorted(copied) == sorted(names)
    with pytest.raises(FileNotFoundError):
        directories.copy_files(uri, f"{store_uri}/y", ["none"])
    back = directories.get_directory(f"{store_uri}/y", tmp_path / "back")
    assert {name: (back / name).read_bytes() for name in files} == files
    directories.remove_directory(uri)
    assert directories.list_files(uri) == []
    assert not directories.object_exists(f"{uri}/empty")


@every_store
def test_a_folder_exists_only_with_its_manifest(
    store_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, uri = folder(tmp_path / "mine", a=b"one", gone=b"x"), f"{store_uri}/x"
    put = directories.put_file

    def break_off(path: Path, target: str) -> None:
        put(path, target)
        raise KeyboardInterrupt

    def refuse(path: Path) -> None:
        assert (path / "a").is_file()
        raise UserError("not what I wanted")

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(directories, "put_file", break_off)
        directories.put_directory(mine, uri)
    assert directories.list_files(uri)
    assert not directories.is_committed(uri)
    with pytest.raises(UserError, match="its upload is incomplete"):
        directories.get_directory(uri, tmp_path / "back")
    assert directories.put_directory(mine, uri)
    with pytest.raises(UserError, match="not what"):
        directories.get_directory(uri, tmp_path / "back", check=refuse)
    with pytest.raises(UserError, match="altered or cut short"):
        directories.get_file(f"{uri}/a", tmp_path / "one", sha256="0" * 64)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "store") == ["mine"]

    new = folder(tmp_path / "new", a=b"eno")
    (new / "manifest.json").write_text('{"n": 1}')
    assert directories.put_directory(new, uri)
    assert [entry.name for entry in directories.list_files(uri)] == ["a", "manifest.json"]
    assert directories.read_bytes(f"{uri}/a") == b"eno"
    (mine / "manifest.json").unlink()
    with pytest.raises(UserError, match="not whole"):
        directories.put_directory(mine, uri)


@every_client
def test_what_has_arrived_is_not_sent_again(
    store_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The MD5 of the store decides: a file of the same size and other bytes is sent."""
    mine, uri = folder(tmp_path / "mine", same=b"same", other=b"other", new=b"new"), store_uri
    directories.put_directory(mine, uri)
    directories.write_bytes(f"{uri}/other", b"OTHER")
    for name in ("new", "manifest.json"):
        directories.remove_file(f"{uri}/{name}")
    sent: list[str] = []
    put = directories.put_file
    monkeypatch.setattr(directories, "put_file", lambda a, b: (sent.append(a.name), put(a, b)))
    assert directories.put_directory(mine, uri)
    assert sorted(sent) == ["new", "other"]
    assert directories.read_bytes(f"{uri}/other") == b"other"


@every_client
def test_a_bucket_that_is_not_there(store_uri: str, tmp_path: Path) -> None:
    nowhere = f"{store_uri.partition('://')[0]}://no-such-place/x"
    (tmp_path / "a").write_bytes(b"a")
    for action in (
        lambda: directories.list_files(nowhere),
        lambda: directories.list_folders(nowhere),
        lambda: directories.object_exists(nowhere),
        lambda: directories.write_bytes(nowhere, b"a"),
        lambda: directories.put_file(tmp_path / "a", nowhere),
        lambda: directories.create_bytes(nowhere, b"a"),
    ):
        with pytest.raises(UserError, match=r"no (bucket|container) 'no-such-place'.*create it"):
            action()


# -- folders that are kept in step ------------------------------------------------------------


@every_store
def test_names_go_up_in_order_and_come_down(store_uri: str, tmp_path: Path) -> None:
    here = SyncedFolder(store_uri, tmp_path / "here")
    folder(here.local / "model", weights=b"w")
    folder(here.local / "half").joinpath("manifest.json").unlink()
    folder(here.local, first=b"1", last=b"2")
    here.upload("model/", "half/", "first", "missing", "last")
    assert here.has("model/")
    assert here.has("last")
    assert not here.has("half/")
    assert not here.has("missing")

    there = SyncedFolder(store_uri, tmp_path / "there")
    folder(there.local, first=b"newer")
    there.download("model/", "half/", "first", "missing", "last", missing_only=True)
    assert (there.local / "first").read_bytes() == b"newer"
    there.download("first")
    names = ["first", "last", "model/manifest.json", "model/weights"]
    found = {path.relative_to(there.local).as_posix() for path in there.local.rglob("*.*")}
    assert all((there.local / name).is_file() for name in names), found
    assert (there.local / "first").read_bytes() == b"1"
    here.upload("first", "last", move=True)
    assert not (here.local / "last").exists()

    def refuse(path: Path) -> None:
        raise UserError("invalid")

    with pytest.raises(UserError, match="invalid"):
        SyncedFolder(store_uri, tmp_path / "third", refuse).download("model/")
    assert not (tmp_path / "third" / "model").exists()


class KilledAtRequest:
    """Ends a process at its n-th change of a store."""

    def __init__(self, number: int, patch: pytest.MonkeyPatch) -> None:
        self._left = number
        for name in ("put_file", "remove_file", "copy_file"):
            patch.setattr(directories, name, partial(self._change, getattr(directories, name)))

    def _change(self, change: Callable[..., None], *places: Any) -> None:
        self._left -= 1
        if not self._left:
            raise KeyboardInterrupt
        change(*places)


@pytest.mark.parametrize("old", [{}, dict.fromkeys(["manifest", "rejected", "shard-0", "z"], b"o")])
def test_a_publication_killed_at_any_request_is_whole_or_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: dict[str, bytes]
) -> None:
    """A reader that finds the last name finds all others, and the next attempt finishes."""
    stored, local = ["shard-0", "shard-1"], ["rejected", "manifest"]
    new = dict.fromkeys(sorted([*stored, *local]), b"new")
    for number in itertools.count(1):
        target = f"memory://{tmp_path.name}-{len(old)}/{number}/corpus"
        staging = SyncedFolder(f"{target}.partial", tmp_path / f"{number}")
        folder(staging.local, **dict.fromkeys(local, b"new"))
        for uri, files in ((target, old), (staging.uri, dict.fromkeys(stored, b"new"))):
            for name, content in files.items():
                directories.write_bytes(f"{uri}/{name}", content)

        def found(uri: str = target) -> dict[str, bytes]:
            entries = directories.list_files(uri)
            return {entry.name: directories.read_bytes(f"{uri}/{entry.name}") for entry in entries}

        with monkeypatch.context() as patch:
            KilledAtRequest(number, patch)
            try:
                staging.publish(target, stored, local)
            except KeyboardInterrupt:
                is_killed = True
            else:
                is_killed = False
        assert "manifest" not in found() or found() in (old, new), number
        if found() != new:
            staging.publish(target, stored, local)
        assert found() == new
        if not is_killed:
            break
    assert number > 6
    assert not staging.local.exists()
    assert directories.list_files(staging.uri) == []


# -- outages ----------------------------------------------------------------------------------


def test_an_outage_is_waited_for(
    object_store: ObjectStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, uri = folder(tmp_path / "mine"), f"{object_store.uri}/x"
    # The first request loads the client, which can take longer than the outage.
    assert not directories.is_committed(uri)
    object_store.door.shut()
    opener = threading.Timer(3.0, object_store.door.unshut)
    opener.start()
    assert directories.put_directory(mine, uri)
    opener.join()
    assert directories.is_committed(uri)
    said = capsys.readouterr().err
    assert all(words in said for words in ("does not answer", "retrying", "127.0.0.1"))


def test_an_outage_that_lasts_says_so(
    object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    object_store.door.shut()
    monkeypatch.setenv("SKILLNET_STORE_PATIENCE", "1")
    try:
        with pytest.raises(StoreUnavailableError, match="did not answer for 1 s"):
            directories.put_directory(folder(tmp_path / "mine"), object_store.uri)
    finally:
        object_store.door.unshut()


@pytest.mark.parametrize("given", ["soon", "-1", "inf"])
def test_patience_is_checked(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("SKILLNET_STORE_PATIENCE", given)
    with pytest.raises(UserError, match="expected seconds"):
        retry_patience()


# -- refusals, by errors of the shape that clients raise --------------------------------------


def test_keys_that_the_store_refuses(object_store: ObjectStore) -> None:
    """No keys at all, and keys that a server that checks signatures does not know."""
    with (
        in_environment({"AWS_EC2_METADATA_DISABLED": "true", "HOME": "/nonexistent"}),
        pytest.raises(UserError, match=r"refused the credentials.*AWS_ACCESS_KEY_ID"),
    ):
        directories.object_exists(object_store.uri)
    server = ObjectStore(checks_keys=True)
    try:
        with (
            in_environment({**server.environment, **KEYS, "AWS_ACCESS_KEY_ID": "wrong"}),
            pytest.raises(UserError, match="refused the credentials"),
        ):
            directories.write_bytes("s3://skillnet-test/a", b"x")
    finally:
        server.close()


def client_error(text: str, module: str = "azure.core.exceptions", **fields: Any) -> Exception:
    """Return an error as a client raises it."""
    kind = type(fields.pop("kind", "HttpResponseError"), (Exception,), {"__module__": module})
    error: Exception = kind(text)
    for name, value in fields.items():
        setattr(error, name, value)
    return error


def google_error(text: str, code: int) -> Exception:
    return client_error(text, "gcsfs.retry", kind="HttpError", code=code)


@pytest.mark.parametrize(
    "problem",
    [
        client_error("Cannot connect to host 127.0.0.1:10011", kind="ServiceRequestError"),
        client_error("Server is busy", status_code=503),
        client_error("slow down", status_code=429),
        google_error("Service Unavailable", 503),
    ],
)
def test_a_store_that_is_away_is_waited_for(
    problem: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SKILLNET_STORE_PATIENCE", "0.2")
    assert is_transient(problem)
    assert explain_refusal("abfs://skillnet/x", problem) is None
    tries: list[int] = []

    def fail() -> None:
        tries.append(1)
        raise problem

    with pytest.raises(StoreUnavailableError, match="did not answer"):
        retry_transient("abfs://skillnet/x", fail)
    assert tries


AZURE_URI = "abfs://mine@account.dfs.core.windows.net/x"


@pytest.mark.parametrize(
    ("uri", "problem", "said"),
    [
        ("abfs://c/x", client_error("Server failed", status_code=403), r"credentials.*AZURE_STOR"),
        ("az://c/x", client_error("no", kind="ClientAuthenticationError"), "credentials.*AZURE_ST"),
        ("abfs://c/x", ValueError("unable to connect to account for …"), "credentials.*AZURE_STOR"),
        ("gs://b/x", google_error("Anonymous caller", 401), r"credentials.*GOOGLE_APPLICATION_CR"),
        ("gs://b/x", OSError("Forbidden: b/x"), r"credentials \(OSError.*GOOGLE_APPLICATION_CRED"),
        ("abfs://UPPER/x", client_error("invalid characters", status_code=400), "refused the requ"),
        (AZURE_URI, client_error("ErrorCode:ContainerNotFound", status_code=404), "container 'min"),
        ("s3://mine/a", FileNotFoundError("The specified bucket does not exist"), "bucket 'mine'"),
        ("s3://mine/a", FileNotFoundError("An error occurred (NoSuchBucket) when"), "bucket 'mine"),
        ("s3://mine/a", FileNotFoundError("Bucket 'mine' was not found"), "no bucket 'mine'"),
        (
            "gs://b/x",
            ModuleNotFoundError("No module named 'gcsfs'"),
            r"pip install .* -e '\.\[gs\]'",
        ),
    ],
)
def test_a_refusal_is_one_message_and_is_not_tried_again(
    uri: str, problem: Exception, said: str
) -> None:
    tries: list[int] = []

    def fail() -> None:
        tries.append(1)
        raise problem

    with pytest.raises(UserError, match=said):
        retry_transient(uri, fail)
    assert tries == [1]


@pytest.mark.parametrize(
    ("uri", "problem"),
    [
        *(
            ("s3://bucket/a.mp4", FileNotFoundError(said))
            for said in (
                "bucket/clips/a.mp4",
                "Path does not exist 'my-bucket/a.mp4'",
                "[Errno 2] No such file or directory: '/bucket'",
                "s3://bucket/a.mp4 not found",
                "The specified key does not exist: buckets/bucket.json",
            )
        ),
        (AZURE_URI, client_error("ErrorCode:BlobNotFound", status_code=404)),
    ],
)
def test_a_missing_object_is_no_missing_bucket(uri: str, problem: Exception) -> None:
    """The name of the path does not matter."""

    def fail() -> None:
        raise problem

    with pytest.raises(FileNotFoundError):
        retry_transient(uri, fail)


def test_the_clients_own_classes_have_that_shape() -> None:
    azure = pytest.importorskip("azure.core.exceptions")
    assert is_transient(azure.ServiceRequestError("away"))
    assert not is_transient(azure.ClientAuthenticationError("no"))
    retry = pytest.importorskip("gcsfs.retry")
    assert is_transient(retry.HttpError({"code": 503, "message": "away"}))
    assert not is_transient(retry.HttpError({"code": 401, "message": "no"}))


def test_an_unknown_kind_of_store() -> None:
    with pytest.raises(UserError, match=r"s4://.*is not a known object store; known: .*s3"):
        directories.object_exists("s4://bucket/x")


DIGEST = hashlib.md5(b"content", usedforsecurity=False).digest()


@pytest.mark.parametrize(
    ("info", "digest"),
    [
        ({"ETag": f'"{DIGEST.hex()}"'}, DIGEST),
        ({"md5Hash": base64.b64encode(DIGEST).decode(), "etag": "CAE="}, DIGEST),
        ({"content_settings": {"content_md5": bytearray(DIGEST)}, "etag": "0x8D"}, DIGEST),
        ({}, None),
        ({"ETag": '"abc-2"'}, None),
        ({"content_settings": {"content_md5": None}}, None),
        ({"etag": "0x8D"}, None),
    ],
)
def test_the_digest_that_a_store_reports(info: dict[str, Any], digest: bytes | None) -> None:
    assert md5_of(info) == digest
