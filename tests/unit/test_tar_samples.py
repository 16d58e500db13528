"""Which members of a tar belong together, and what becomes of those that do not."""

import gzip
from collections import Counter
from pathlib import Path

import pytest

from pipelines.corpora import guess_reader, place_corpus
from pipelines.corpora.base import Rejected, Sources
from pipelines.corpora.placed import PlacedCorpus
from pipelines.corpora.webdataset import APART, SECOND
from pipelines.places import Place
from tests.packing import tarred
from tests.unit.test_readers import Rows, media, read, sizes

Files = dict[str, bytes]


def tar(home: Path, files: Files, name: str = "x.tar") -> PlacedCorpus:
    packed = tarred(files)
    (home / name).write_bytes(gzip.decompress(packed) if name.lower().endswith("tar") else packed)
    return place_corpus("webdataset", str(home))


def captioned(count: int, prefix: str = "") -> Files:
    found = {}
    for n in range(count):
        found |= {f"{prefix}{n}.jpg": b"picture %d" % n, f"{prefix}{n}.txt": b"words %d" % n}
    return found


def pairs(rows: Rows) -> dict[bytes, str]:
    return {media(row): row["captions"][0] for each in rows.values() for row in each}


def test_a_name_ends_at_its_first_dot(tmp_path: Path) -> None:
    corpus = tar(tmp_path, captioned(20, "v1."))
    rows, reasons = read(corpus)
    # What is taken belongs together, and nothing of what is not goes uncounted.
    assert pairs(rows) == {b"picture 0": "words 0"}
    assert reasons == {SECOND: 38}
    found = [row for row in corpus.rows(Sources.none()) if isinstance(row, Rejected)]
    assert Counter(row.bad for row in found) == {True: 19, False: 19}  # so that a prepare stops
    assert found[0].file == "x.tar"


def test_a_mask_beside_a_picture_is_left_out_by_choice(tmp_path: Path) -> None:
    files = {}
    for n in range(3):
        files |= {f"{n}.txt": b"words", f"{n}.jpg": b"picture", f"{n}.mask.png": b"mask"}
    corpus = tar(tmp_path, files)
    found = [row for row in corpus.rows(Sources.none()) if isinstance(row, Rejected)]
    assert [(row.reason, row.bad) for row in found] == [(SECOND, False)] * 3


@pytest.mark.parametrize("name", ["x.tar", "x.TAR", "x.TGZ"])
def test_what_systems_leave_in_a_tar_is_passed_over(tmp_path: Path, name: str) -> None:
    files: Files = {"./.DS_Store": b"x", "./Thumbs.db": b"x", "./README": b"x"}
    for member, data in captioned(6).items():
        files |= {f"./._{member}": b"\0\5\26\7", f"./{member}": data, "./Thumbs.db": b"x"}
        files[f"__MACOSX/{member}"] = b"\0\5\26\7"
    corpus = tar(tmp_path, files, name)
    assert guess_reader(Place(str(tmp_path))) is not None
    rows, reasons = read(corpus)
    assert not reasons
    assert pairs(rows) == {b"picture %d" % n: f"words {n}" for n in range(6)}


def test_members_that_are_not_side_by_side(tmp_path: Path) -> None:
    files = captioned(3)
    apart = {name: files[name] for name in sorted(files, key=lambda name: name[-3:])}
    found = tar(tmp_path, apart).rows(Sources.none())
    reasons = Counter(row.reason for row in found if isinstance(row, Rejected))
    assert reasons == {"a picture without captions": 3, APART: 3}


def test_a_test_without_labels_comes_before_the_rest(tmp_path: Path) -> None:
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
    assert rows["test"]  # made of the training rows
