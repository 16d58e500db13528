"""Source directories with circular links, irregular files and names that are not UTF-8."""

import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from pipelines.data.corpora import open_external_corpus
from pipelines.data.corpora.base import SourceArchives
from pipelines.data.io.archive import TarReader, TarReadError
from pipelines.data.io.directory import MAX_LINKS_PER_FOLDER, SourceDirectory
from pipelines.data.preprocessing.blocks import ReadSummary, RowBlock, read_blocks
from pipelines.data.preprocessing.inspection import inspect_corpus
from skillnet_platform.errors import UserError
from tests.helpers import user_corpora

#: A name in GBK, as Python spells it.
ODD = os.fsdecode("狗".encode("gbk"))


def summary(place: Path, folder: Path, reader: str = "folder") -> tuple[list[str], ReadSummary]:
    """Return the keys of accepted rows, and the summary."""
    corpus = open_external_corpus("mine", f"{reader}:{place}")
    corpus.scan_labels()
    json.dumps(corpus.extra_sources(), ensure_ascii=False).encode()
    keys: list[str] = []
    for found in read_blocks(corpus, SourceArchives.none(), folder / "rejected.jsonl"):
        if isinstance(found, RowBlock):
            keys += found.table["key"].to_pylist()
    assert isinstance(found, ReadSummary)
    return sorted(keys), found


def classes(folder: Path) -> Path:
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for number in range(3):
            (folder / name / f"{number}.jpg").write_bytes(user_corpora.jpg(number))
    return folder


CLASSES = [f"{name}/{number}.jpg" for name in ("cat", "dog") for number in range(3)]


class TestLinks:
    @pytest.mark.parametrize("loops", [1, 3])
    def test_circular_links_are_followed_once(self, tmp_path: Path, loops: int) -> None:
        """Three loops would be 3 ** 16 paths, and an image would be in all splits."""
        given = classes(tmp_path / "given")
        for number in range(loops):
            (given / "cat" / f"loop{number}").symlink_to(".")
            (given / "cat" / f"up{number}").symlink_to("..")
        place = SourceDirectory(str(given))
        assert [entry.name for entry in place.walk()] == CLASSES
        assert list(place.folders()) == ["", "cat", "dog"]
        assert summary(given, tmp_path)[0] == CLASSES

    def test_links_to_other_directories_are_followed(self, tmp_path: Path) -> None:
        """Media often lie on another disk than their annotations."""
        disk = classes(tmp_path / "disk")
        given = tmp_path / "given"
        given.mkdir()
        (given / "cat").symlink_to(disk / "cat")
        (given / "dog").mkdir()
        for file in sorted((disk / "dog").iterdir()):
            (given / "dog" / file.name).symlink_to(file)
        assert summary(given, tmp_path)[0] == CLASSES

    def test_two_links_to_one_directory_are_both_followed(self, tmp_path: Path) -> None:
        given = classes(tmp_path / "given")
        (given / "wolf").symlink_to("dog")
        names = [entry.name for entry in SourceDirectory(str(given)).walk()]
        assert names == [*CLASSES, *(f"wolf/{number}.jpg" for number in range(3))]

    def test_exponentially_many_links_are_rejected(self, tmp_path: Path) -> None:
        """Each directory has two links to the next one: 2 ** 12 paths without a circle."""
        for number in range(12):
            (tmp_path / f"d{number}").mkdir()
            for name in "ab":
                (tmp_path / f"d{number}" / name).symlink_to(f"../d{number + 1}")
        (tmp_path / "d12").mkdir()
        with pytest.raises(
            UserError, match=f"more than {MAX_LINKS_PER_FOLDER} links lead to this directory"
        ):
            list(SourceDirectory(str(tmp_path / "d0")).walk())

    def test_dangling_links_are_reported(self, tmp_path: Path) -> None:
        given = classes(tmp_path / "given")
        (given / "cat" / "3.jpg").symlink_to("nowhere.jpg")
        (given / "cat" / "4.jpg").symlink_to("4.jpg")
        assert [entry.name for entry in SourceDirectory(str(given)).walk("cat")][3:] == [
            "cat/3.jpg",
            "cat/4.jpg",
        ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (os.mkfifo, r"metadata\.jsonl: a pipe, device or socket"),
        (lambda path: path.symlink_to("/dev/zero"), r"metadata\.jsonl: a pipe, device or socket"),
        (Path.mkdir, r"metadata\.jsonl: a folder; expected a file"),
    ],
)
def test_irregular_files_are_rejected(make, message, tmp_path):
    make(tmp_path / "metadata.jsonl")
    with pytest.raises(UserError, match=message):
        open_external_corpus("mine", f"folder:{tmp_path}")
    if make is os.mkfifo:
        with pytest.raises(UserError, match="a pipe, device or socket"):
            SourceDirectory(str(tmp_path / "metadata.jsonl"))


class TestNamesThatAreNotUtf8:
    def test_only_the_rows_of_such_names_are_rejected(self, tmp_path: Path) -> None:
        given = classes(tmp_path / "given")
        (given / ODD).mkdir()
        (given / ODD / "0.jpg").write_bytes(user_corpora.jpg(0))
        for more in ("", "b"):
            (given / "dog" / f"{ODD}{more}.jpg").write_bytes(user_corpora.jpg(0))
        keys, found = summary(given, tmp_path)
        assert keys == CLASSES
        assert found.rejections == {
            "not UTF-8": 1,
            "the media file's name is not UTF-8; rename it": 2,
        }
        reported = (tmp_path / "rejected.jsonl").read_text("utf-8")
        assert r"dog/\\udcb9\\udcb7.jpg" in reported

    def test_annotation_file_of_such_a_name_is_read(self, tmp_path: Path) -> None:
        rows = "".join(f'{{"text": "第{n}条", "label": "{n % 2}"}}\n' for n in range(20))
        (tmp_path / "given").mkdir()
        (tmp_path / "given" / f"train.{ODD}.jsonl").write_text(rows + '{"text', "utf-8")
        keys, found = summary(tmp_path / "given", tmp_path)
        assert len(keys) == 20
        (name,) = found.truncated_files
        assert name == r"train.\udcb9\udcb7.jsonl"

    def test_corpus_path_of_such_a_name_is_reported(self, tmp_path: Path) -> None:
        (tmp_path / ODD).mkdir()
        with pytest.raises(UserError, match=r"udcb9.udcb7: the path is not UTF-8"):
            SourceDirectory(str(tmp_path / ODD))
        (tmp_path / "link").symlink_to(ODD)
        assert not SourceDirectory(str(tmp_path / "link")).entries()

    def test_inspection_report_is_valid_json(self, tmp_path: Path) -> None:
        row = {"text": "甲", "label": "a", "more": {"\udcb9": ["\udcb7"]}}
        (tmp_path / f"train.{ODD}.jsonl").write_text((json.dumps(row) + "\n") * 9)
        found = inspect_corpus(f"folder:{tmp_path}")
        assert found["source"]["more"] == {r"\udcb9": [r"\udcb7"]}
        json.dumps(found, ensure_ascii=False).encode()

    def test_tar_of_such_a_name_is_reported(self, tmp_path: Path) -> None:
        tars = user_corpora.webdataset(tmp_path / "given", rows=6)
        (tars / "train-000000.tar").rename(tars / f"train-{ODD}.tar")
        _, found = summary(tars, tmp_path, "webdataset")
        assert set(found.errors) == {"the media file's name is not UTF-8; rename it"}


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_tar_with_endless_headers_is_rejected(kind: bytes) -> None:
    """tarfile parses each header inside the previous one."""
    record = b"abc\0" if kind == tarfile.GNUTYPE_LONGNAME else b"12 path=abc\n"
    head = tarfile.TarInfo("x")
    head.type, head.size = kind, len(record)
    one = head.tobuf(tarfile.GNU_FORMAT) + record.ljust(512, b"\0")
    with pytest.raises(TarReadError, match="headers without end"):
        list(TarReader("x.tar", io.BytesIO(one * 2000)))
