"""Archives: verification against the pins, and errors of missing or damaged files."""

import hashlib
from pathlib import Path

import pytest

from pipelines.data.corpora import find_corpus
from pipelines.data.corpora.archives import Archive, check_archive, iter_members, read_member
from pipelines.data.corpora.base import SourceArchives
from skillnet_platform.errors import UserError
from tests.helpers.archive_files import packaged, tarred, zipped

CONTENT = tarred({"package/a.json": b"{}", "package/b/c.mp3": b"sound"})
PIN = Archive("a-1.tgz", len(CONTENT), hashlib.sha256(CONTENT).hexdigest(), "npm", "a@1", "MIT")


def test_the_pinned_file_is_accepted(tmp_path: Path) -> None:
    (tmp_path / PIN.file).write_bytes(CONTENT)
    assert check_archive(PIN, tmp_path) == tmp_path / PIN.file


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
def test_other_files_are_rejected_with_a_remedy(
    tmp_path: Path, data: bytes | None, message: str
) -> None:
    if data is not None:
        (tmp_path / PIN.file).write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        check_archive(PIN, tmp_path)
    assert "npm pack a@1" in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("pack", [zipped, tarred, packaged])
def test_members_are_read_in_place(tmp_path: Path, pack) -> None:  # type: ignore[no-untyped-def]
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
    assert list(sources.members("a-", "package/b/", ".mp3")) == [("c", b"sound")]


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


def test_the_pin_of_a_compiled_wheel_is_downloaded_on_any_machine() -> None:
    name = "a-1-cp310-abi3-manylinux_2_17_x86_64.manylinux2014_x86_64.whl"
    command = Archive(name, 1, "0", "pypi", "a==1", "MIT").download_command()
    assert command == (
        "pip download --no-deps --only-binary :all: --implementation cp --python-version 310 "
        "--abi abi3 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 a==1"
    )
    plain = Archive("a-1-py2.py3-none-any.whl", 1, "0", "pypi", "a==1", "MIT")
    assert plain.download_command() == "pip download --no-deps --only-binary :all: a==1"
