"""Samples of tars: which members belong together, and how other members are reported."""

import gzip
import json
import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from pipelines.data.corpora import detect_reader, open_external_corpus
from pipelines.data.corpora.base import RejectedRow, SourceArchives
from pipelines.data.corpora.readers.base import ExternalCorpus
from pipelines.data.corpora.readers.webdataset import (
    DUPLICATE_MEMBER,
    NO_MEDIA_MEMBER,
    SPARSE_MEMBER,
)
from pipelines.data.io.directory import SourceDirectory
from skillnet_platform.errors import UserError
from tests.helpers.archive_files import tarred
from tests.unit.pipelines.data.corpora.readers.test_readers import Rows, media, read, sizes

Files = dict[str, bytes]


def tar(home: Path, files: Files, name: str = "x.tar") -> ExternalCorpus:
    packed = tarred(files)
    (home / name).write_bytes(gzip.decompress(packed) if name.lower().endswith("tar") else packed)
    return open_external_corpus("webdataset", str(home))


def captioned(count: int, prefix: str = "") -> Files:
    found = {}
    for n in range(count):
        found |= {f"{prefix}{n}.jpg": b"picture %d" % n, f"{prefix}{n}.txt": b"words %d" % n}
    return found


def pairs(rows: Rows) -> dict[bytes, str]:
    return {media(row): row["captions"][0] for each in rows.values() for row in each}


def test_a_sample_name_ends_at_its_first_dot(tmp_path: Path) -> None:
    corpus = tar(tmp_path, captioned(20, "v1."))
    rows, reasons = read(corpus)
    # Used members belong together, and every other member is counted.
    assert pairs(rows) == {b"picture 0": "words 0"}
    assert reasons == {DUPLICATE_MEMBER: 38}
    found = [row for row in corpus.rows(SourceArchives.none()) if isinstance(row, RejectedRow)]
    assert Counter(row.counts_as_error for row in found) == {
        True: 19,
        False: 19,
    }  # so that preparation stops
    assert found[0].file == "x.tar"


def test_a_missing_tar_of_a_set_is_named(tmp_path: Path) -> None:
    tar(tmp_path, captioned(3), "all-00000-of-00001.tar").rows(SourceArchives.none())
    (tmp_path / "all-00000-of-00001.tar").rename(tmp_path / "train-00001-of-00002.tar")
    with pytest.raises(UserError, match=r"1 of 2 shards missing: train-00000-of-00002\.tar\."):
        open_external_corpus("webdataset", str(tmp_path))


def test_a_mask_beside_an_image_is_omitted_by_choice(tmp_path: Path) -> None:
    files = {}
    for n in range(3):
        files |= {f"{n}.txt": b"words", f"{n}.jpg": b"picture", f"{n}.mask.png": b"mask"}
    corpus = tar(tmp_path, files)
    found = [row for row in corpus.rows(SourceArchives.none()) if isinstance(row, RejectedRow)]
    assert [(row.reason, row.counts_as_error) for row in found] == [(DUPLICATE_MEMBER, False)] * 3


@pytest.mark.parametrize("name", ["x.tar", "x.TAR", "x.TGZ"])
def test_files_of_operating_systems_are_ignored(tmp_path: Path, name: str) -> None:
    files: Files = {"./.DS_Store": b"x", "./Thumbs.db": b"x", "./README": b"x"}
    for member, data in captioned(6).items():
        files |= {f"./._{member}": b"\0\5\26\7", f"./{member}": data, "./Thumbs.db": b"x"}
        files[f"__MACOSX/{member}"] = b"\0\5\26\7"
    corpus = tar(tmp_path, files, name)
    assert detect_reader(SourceDirectory(str(tmp_path))) is not None
    rows, reasons = read(corpus)
    assert not reasons
    assert pairs(rows) == {b"picture %d" % n: f"words {n}" for n in range(6)}


def test_members_that_are_not_adjacent_are_reported(tmp_path: Path) -> None:
    files = captioned(3)
    apart = {name: files[name] for name in sorted(files, key=lambda name: name[-3:])}
    found = tar(tmp_path, apart).rows(SourceArchives.none())
    reasons = Counter(row.reason for row in found if isinstance(row, RejectedRow))
    assert reasons == {"an image without captions": 3, NO_MEDIA_MEMBER: 3}


def test_a_test_tar_without_labels_comes_first(tmp_path: Path) -> None:
    pictures = {f"{n}.jpg": b"x" for n in range(5)}
    labelled = {}
    for n in range(60):
        labelled |= {f"{n}.jpg": b"x", f"{n}.cls": str(n % 2).encode()}
    tar(tmp_path, labelled, "train-0.tar")
    corpus = tar(tmp_path, pictures, "test-0.tar")
    assert corpus.task == "image_classification"
    rows, reasons = read(corpus)
    assert (sizes(rows)["unlabelled"], reasons) == (5, {})
    assert {row["label"] for row in rows["unlabelled"]} == {None}
    assert rows["test"]  # made from the training rows


def test_the_first_bytes_decide_the_compression(tmp_path: Path) -> None:
    packed = tarred(captioned(5))
    (tmp_path / "packed.tar").write_bytes(packed)
    (tmp_path / "plain.tgz").write_bytes(gzip.decompress(packed))
    rows, reasons = read(open_external_corpus("webdataset", str(tmp_path)))
    assert not reasons
    assert Counter(media(row) for row in rows["train"]) <= Counter(
        {b"picture %d" % n: 2 for n in range(5)}
    )
    assert all(media(row).replace(b"picture", b"words").decode() in row["captions"]
               for each in rows.values() for row in each)  # fmt: skip


@pytest.mark.skipif(shutil.which("tar") is None, reason="there is no tar")
@pytest.mark.parametrize("format", ["gnu", "posix"])
def test_a_sparse_file_is_rejected(tmp_path: Path, format: str) -> None:
    home = tmp_path / "made"
    home.mkdir()
    for name, data in captioned(3).items():
        (home / name).write_bytes(data)
    os.truncate(home / "1.jpg", 1 << 20)
    words = ["tar", "--create", "--sparse", f"--format={format}", "--sort=name"]
    subprocess.run([*words, "--file=x.tar", "--directory=made", "."], cwd=tmp_path, check=True)
    shutil.rmtree(home)
    rows, reasons = read(open_external_corpus("webdataset", str(tmp_path)))
    assert sum(len(each) for each in rows.values()) == 2
    assert reasons == {SPARSE_MEMBER: 1}


def test_more_than_a_thousand_captions_are_rejected(tmp_path: Path) -> None:
    files = {}
    for name, count in ("0", 2), ("1", 1001), ("2", 1000):
        said = {"caption": [f"words {n}" for n in range(count)]}
        files |= {f"{name}.jpg": b"picture", f"{name}.json": json.dumps(said).encode()}
    rows, reasons = read(tar(tmp_path, files))
    assert reasons == {"more than 1000 captions": 1}
    assert sum(len(each) for each in rows.values()) == 2
