"""Folders in a store: committed by their manifest, kept through outages, refused in one message."""

import threading
import uuid
from pathlib import Path

import pytest

from skillnet_platform.errors import UserError
from skillnet_platform.storage import directories
from skillnet_platform.storage.retry import explain_refusal, retry_patience
from tests.helpers.object_store import KEYS, ObjectStore, in_environment


def folder(path: Path, **files: bytes) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name, data in (files or {"a": b"one", "b": b"two"}).items():
        (path / name).write_bytes(data)
    (path / "manifest.json").write_text("{}")
    return path


@pytest.fixture(params=["s3", "file", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder in each kind of store."""
    if request.param == "s3":
        return str(request.getfixturevalue("object_store").uri)
    if request.param == "file":
        return f"file://{tmp_path}/store"
    return f"memory://{uuid.uuid4().hex}"


def test_uris() -> None:
    assert directories.is_uri("s3://bucket/a")
    assert directories.is_uri("memory://a")
    for path in (None, "runs/a", "/data", "models:/skillnet@champion", "http://host/a", Path("a")):
        assert not directories.is_uri(path)
    assert directories.join_uri("s3://b/a/", "c/", "d.json") == "s3://b/a/c/d.json"
    assert (
        directories.join_uri("s3://b/corpora/x", "../tokenizer.json")
        == "s3://b/corpora/tokenizer.json"
    )
    assert directories.join_uri("file:///tmp/a", "b") == "file:///tmp/a/b"
    assert directories.join_uri("memory://a", "b") == "memory://a/b"
    with pytest.raises(UserError, match="leads out"):
        directories.join_uri("s3://b/a", "../../other/x")


def test_a_folder_goes_up_and_comes_down(place: str, tmp_path: Path) -> None:
    mine = folder(tmp_path / "mine", a=b"one", b=b"")
    (mine / "deep").mkdir()
    (mine / "deep" / "c").write_bytes(b"three")
    uri = directories.join_uri(place, "x")
    assert not directories.is_committed(uri)
    assert directories.list_files(uri) == []
    assert directories.put_directory(mine, uri)
    assert directories.is_committed(uri)
    assert directories.list_folders(place) == ["x"]
    names = [(entry.name, entry.bytes) for entry in directories.list_files(uri)]
    assert names == [("a", 3), ("b", 0), ("deep/c", 5), ("manifest.json", 2)]
    assert not directories.put_directory(mine, uri)  # nothing changed, nothing is sent
    back = directories.get_directory(uri, tmp_path / "back")
    assert (back / "deep" / "c").read_bytes() == b"three"
    assert (back / "b").read_bytes() == b""
    with directories.open_file(directories.join_uri(uri, "a")) as stream:
        stream.seek(1)
        assert stream.read() == b"ne"
    directories.remove_directory(uri)
    assert directories.list_files(uri) == []
    assert not directories.object_exists(directories.join_uri(uri, "a"))


def test_another_content_replaces_a_folder(place: str, tmp_path: Path) -> None:
    uri = directories.join_uri(place, "x")
    directories.put_directory(folder(tmp_path / "old", a=b"one", gone=b"x"), uri)
    new = folder(tmp_path / "new", a=b"eno")
    (new / "manifest.json").write_text('{"n": 1}')
    assert directories.put_directory(new, uri)
    assert [entry.name for entry in directories.list_files(uri)] == ["a", "manifest.json"]
    assert directories.read_bytes(directories.join_uri(uri, "a")) == b"eno"


def test_without_its_manifest_a_folder_counts_as_nothing(place: str, tmp_path: Path) -> None:
    mine, uri = folder(tmp_path / "mine"), directories.join_uri(place, "x")

    def break_off(name: str, size: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        directories.put_directory(mine, uri, on_file=break_off)
    assert directories.list_files(uri)
    assert not directories.is_committed(uri)
    with pytest.raises(UserError, match="its upload is incomplete"):
        directories.get_directory(uri, tmp_path / "back")
    assert directories.put_directory(mine, uri)
    assert directories.is_committed(uri)
    (mine / "manifest.json").unlink()
    with pytest.raises(UserError, match="not whole"):
        directories.put_directory(mine, uri)


def test_a_download_that_fails_its_check_leaves_nothing(place: str, tmp_path: Path) -> None:
    uri = directories.join_uri(place, "x")
    directories.put_directory(folder(tmp_path / "mine"), uri)

    def refuse(path: Path) -> None:
        assert (path / "a").is_file()
        raise UserError("not what I wanted")

    with pytest.raises(UserError, match="not what"):
        directories.get_directory(uri, tmp_path / "back", check=refuse)
    with pytest.raises(UserError, match="altered or cut short"):
        directories.get_file(directories.join_uri(uri, "a"), tmp_path / "one", sha256="0" * 64)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "store") == ["mine"]


def test_an_upload_resumes_where_it_stopped(object_store: ObjectStore, tmp_path: Path) -> None:
    sent: list[str] = []
    original = directories.put_file
    mine = folder(tmp_path / "mine", **{f"f{n}": bytes([n]) * 100 for n in range(6)})
    for name in ("f0", "f1"):
        directories.put_file(mine / name, directories.join_uri(object_store.uri, name))
    directories.write_bytes(
        directories.join_uri(object_store.uri, "f2"), b"x" * 100
    )  # same size, other bytes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(directories, "put_file", lambda a, b: (sent.append(a.name), original(a, b)))
        directories.put_directory(mine, object_store.uri)
    assert sorted(sent) == ["f2", "f3", "f4", "f5"]
    assert directories.read_bytes(directories.join_uri(object_store.uri, "f2")) == bytes([2]) * 100


def test_an_outage_is_waited_for(
    object_store: ObjectStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, uri = folder(tmp_path / "mine"), directories.join_uri(object_store.uri, "x")
    # The first request loads the client, which can take longer than the outage.
    assert not directories.is_committed(uri)
    object_store.door.shut()
    opener = threading.Timer(3.0, object_store.door.unshut)
    opener.start()
    assert directories.put_directory(mine, uri)
    opener.join()
    assert directories.is_committed(uri)
    said = capsys.readouterr().err
    assert "does not answer" in said
    assert "retrying" in said
    assert "127.0.0.1" in said


def test_an_outage_that_lasts_says_so(object_store: ObjectStore, tmp_path: Path) -> None:
    mine = folder(tmp_path / "mine")
    object_store.door.shut()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SKILLNET_STORE_PATIENCE", "1")
            with pytest.raises(directories.StoreUnavailableError, match="did not answer for 1 s"):
                directories.put_directory(mine, object_store.uri)
    finally:
        object_store.door.unshut()


def test_wrong_credentials_and_missing_bucket(object_store: ObjectStore) -> None:
    other = object_store.uri.replace("skillnet-test", "no-such-bucket")
    for action in (directories.object_exists, directories.list_files, directories.list_folders):
        with pytest.raises(UserError, match=r"no bucket 'no-such-bucket'.*create it"):
            action(other)
    with pytest.raises(UserError, match="no bucket 'no-such-bucket'"):
        directories.write_bytes(directories.join_uri(other, "a"), b"x")
    with (
        in_environment({"AWS_EC2_METADATA_DISABLED": "true", "HOME": "/nonexistent"}),
        pytest.raises(UserError, match=r"refused the credentials.*AWS_ACCESS_KEY_ID"),
    ):
        directories.object_exists(object_store.uri)


@pytest.mark.parametrize(
    "said",
    [
        "The specified bucket does not exist",
        "An error occurred (NoSuchBucket) when calling the ListObjectsV2 operation",
        "Bucket 'mine' was not found",
    ],
)
def test_a_missing_bucket_is_recognized_by_messages_of_clients(said: str) -> None:
    reported = explain_refusal("s3://mine/a", FileNotFoundError(said))
    assert reported is not None
    assert "there is no bucket 'mine'" in reported


@pytest.mark.parametrize(
    "said",
    [
        "bucket/clips/a.mp4",
        "Path does not exist 'my-bucket/a.mp4'",
        "[Errno 2] No such file or directory: '/bucket'",
        "s3://bucket/a.mp4 not found",
        "The specified key does not exist: buckets/bucket.json",
    ],
)
def test_a_missing_file_is_no_missing_bucket(said: str) -> None:
    """The name of the path does not matter."""
    assert explain_refusal("s3://bucket/a.mp4", FileNotFoundError(said)) is None


def test_keys_that_the_store_refuses(tmp_path: Path) -> None:
    """A server that checks signatures and policies knows no such key."""
    server = ObjectStore(checks_keys=True)
    try:
        with (
            in_environment({**server.environment, **KEYS, "AWS_ACCESS_KEY_ID": "wrong"}),
            pytest.raises(UserError, match="refused the credentials"),
        ):
            directories.write_bytes("s3://skillnet-test/a", b"x")
    finally:
        server.close()


def test_unknown_and_uninstalled_kinds_of_store() -> None:
    with pytest.raises(UserError, match=r"s4://.*is not a known object store; known: .*s3"):
        directories.object_exists("s4://bucket/x")
    reported = explain_refusal("gs://bucket/x", ModuleNotFoundError("No module named 'gcsfs'"))
    assert reported is not None
    assert "pip install 'skillnet-platform[gs]'" in reported


@pytest.mark.parametrize("given", ["soon", "-1", "inf"])
def test_patience_is_checked(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("SKILLNET_STORE_PATIENCE", given)
    with pytest.raises(UserError, match="expected seconds"):
        retry_patience()


def test_files_are_copied_within_a_store(place: str, tmp_path: Path) -> None:
    uri = f"{place}/from"
    directories.put_directory(folder(tmp_path / "mine", a=b"one", b=b"two"), uri)
    copied: list[str] = []
    directories.copy_files(uri, f"{place}/to", ["a", "b"], copied.append)
    assert sorted(copied) == ["a", "b"]
    assert directories.read_bytes(f"{place}/to/b") == b"two"
    with pytest.raises(FileNotFoundError):
        directories.copy_files(uri, f"{place}/to", ["c"])
