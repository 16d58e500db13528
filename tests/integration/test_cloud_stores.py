"""Corpora and runs in Google's and Azure's stores, as their emulators play them."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from pipelines import finetune
from pipelines.data.shards.dataset import open_corpus
from skillnet_platform.errors import UserError
from skillnet_platform.storage import directories, objects
from tests.helpers.cloud_stores import CloudStore, azure, google, reached
from tests.helpers.small_corpora import write_corpora
from tests.helpers.user_corpora import webdataset
from tests.integration.test_mirror import config_of

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=[google, azure], ids=["google", "azure"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[CloudStore]:
    store = request.param(tmp_path_factory.mktemp("server"))
    yield store
    store.close()


@pytest.fixture
def store(server: CloudStore) -> Iterator[CloudStore]:
    with reached(server):
        yield server


def prepare(*words: str) -> str:
    """``skillnet prepare`` with a Ray of its own, whose processes know the store."""
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.prepare", *words, "--cpus", "2", "--tokenizer", "learn"],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_files_and_folders(store: CloudStore, tmp_path: Path) -> None:
    uri, folder = f"{store.uri}/files", tmp_path / "folder"
    assert directories.list_files(uri) == []
    assert not directories.object_exists(f"{uri}/none")
    with pytest.raises(FileNotFoundError):
        directories.read_bytes(f"{uri}/none")
    directories.remove_file(f"{uri}/none")

    (folder / "sub").mkdir(parents=True)
    large = os.urandom(12_000_000)
    (folder / "sub" / "large.bin").write_bytes(large)
    (folder / "empty").write_bytes(b"")
    (folder / "manifest.json").write_bytes(b"{}")
    assert directories.put_directory(folder, f"{uri}/a")
    assert not directories.put_directory(folder, f"{uri}/a"), "it is there already"
    names = ["empty", "manifest.json", "sub/large.bin"]
    assert [entry.name for entry in directories.list_files(f"{uri}/a")] == names
    assert directories.list_folders(f"{uri}/a") == ["sub"]
    with directories.open_file(f"{uri}/a/sub/large.bin") as stream:
        stream.seek(7_000_000)
        assert stream.read(100) == large[7_000_000:7_000_100]

    directories.copy_files(f"{uri}/a", f"{uri}/b", names)
    back = directories.get_directory(f"{uri}/b", tmp_path / "back")
    assert (back / "sub" / "large.bin").read_bytes() == large
    directories.remove_directory(f"{uri}/b")
    assert directories.list_files(f"{uri}/b") == []


def test_what_has_arrived_is_not_sent_again(
    store: CloudStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, uri = tmp_path / "folder", f"{store.uri}/again"
    folder.mkdir()
    for name in ("same", "other", "manifest.json"):
        (folder / name).write_bytes(name.encode())
    directories.put_directory(folder, uri)
    directories.write_bytes(f"{uri}/other", b"OTHER")
    directories.remove_file(f"{uri}/manifest.json")
    sent: list[str] = []
    put = objects.put_file
    monkeypatch.setattr(
        directories, "put_file", lambda path, to: (sent.append(path.name), put(path, to))
    )
    assert directories.put_directory(folder, uri)
    assert sent == ["other"]
    assert directories.read_bytes(f"{uri}/other") == b"other"


def test_a_bucket_that_is_not_there(store: CloudStore, tmp_path: Path) -> None:
    nowhere = f"{store.uri.partition('://')[0]}://no-such-place/x"
    (tmp_path / "a").write_bytes(b"a")
    for action in (
        lambda: directories.list_files(nowhere),
        lambda: directories.object_exists(nowhere),
        lambda: directories.write_bytes(nowhere, b"a"),
        lambda: directories.put_file(tmp_path / "a", nowhere),
    ):
        with pytest.raises(UserError, match="no-such-place"):
            action()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A user's corpus on this disk, and the manifest of its shards."""
    root = tmp_path_factory.mktemp("prepared")
    mine = webdataset(root / "mine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SKILLNET_HOME", str(root))
        prepare("--corpus", f"mine=webdataset:{mine}", "--data", str(root / "here"))
    return mine, open_corpus(root / "here" / "mine").manifest


def test_a_users_corpus_goes_from_the_store_into_the_store(
    store: CloudStore, run_root: Path, prepared: tuple[Path, dict[str, Any]]
) -> None:
    mine, here = prepared
    for path in mine.rglob("*"):
        if path.is_file():
            directories.put_file(path, f"{store.uri}/mine/{path.relative_to(mine)}")
    prepare("--corpus", f"mine=webdataset:{store.uri}/mine", "--data", f"{store.uri}/corpora")
    there = open_corpus(f"{store.uri}/corpora/mine", verify=True).manifest
    assert there["rows_out"] == here["rows_out"] > 0
    assert there["splits"] == here["splits"]


def test_a_run_lies_in_the_store_and_reads_from_it(
    store: CloudStore, run_root: Path, tmp_path: Path, ray_session: Any
) -> None:
    data = write_corpora(tmp_path / "data")
    for name in ("headings", "drawings"):
        directories.put_directory(data / name, f"{store.uri}/corpora/{name}")
    config = config_of(data, store)  # type: ignore[arg-type]  # its ``uri`` is all that is asked for
    config.data = f"{store.uri}/corpora"
    result = finetune.finetune(config)
    assert result["mirror"] == f"{store.uri}/a"
    model = load_file(Path(result["model"]) / "shared.safetensors")
    shutil.rmtree(run_root)
    again = finetune.finetune(config)
    assert again["step"] == 12
    other = load_file(Path(again["model"]) / "shared.safetensors")
    assert all((other[name] == value).all() for name, value in model.items())
