"""Layouts of widespread corpora: COCO, Flickr, Common Voice, LJSpeech, and CSV with semicolons.

Samples of tars: which members belong together, and how other members are reported.
"""

import gzip
import json
import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipelines.data.corpora import detect_reader, open_external_corpus
from pipelines.data.corpora.base import RejectedRow, SourceArchives
from pipelines.data.corpora.readers.base import ExternalCorpus
from pipelines.data.io.directory import SourceDirectory
from pipelines.data.preprocessing import inspection
from skillnet_corpora.readers.fields import parse_split_name, parse_split_prefix
from skillnet_corpora.readers.webdataset import (
    DUPLICATE_MEMBER,
    NO_MEDIA_MEMBER,
    SPARSE_MEMBER,
)
from skillnet_platform.errors import UserError
from tests.helpers import user_corpora
from tests.helpers.archive_files import tarred
from tests.helpers.corpus_rows import Rows, media, read, sizes


def detected(place: Path, options: dict[str, Any] | None = None) -> ExternalCorpus:
    """Open a corpus in the format that is detected, which is ``folder``."""
    found = detect_reader(SourceDirectory(str(place)))
    assert found is not None
    assert found[0] == "folder"
    return open_external_corpus("mine", f"folder:{place}", options)


def names(rows: Rows, split: str) -> set[str]:
    return {Path(row["media"]["path"]).name for row in rows[split]}


def captions_of(rows: Rows, name: str) -> set[str]:
    every = (row for each in rows.values() for row in each)
    return {c for row in every if row["media"]["path"].endswith(name) for c in row["captions"]}


def write_files(home: Path, data: bytes, *files: str) -> None:
    for file in files:
        (home / file).parent.mkdir(parents=True, exist_ok=True)
        (home / file).write_bytes(data)


def unread(corpus: ExternalCorpus) -> str:
    corpus.extra_sources()
    return corpus.describe_unread()


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train2017", "train"),
        ("Val2014", "validation"),
        ("test_1", "test"),
        ("dev-2", "validation"),
        ("train", "train"),
        ("trainval2007", None),
        ("train2017b", None),
        ("2017", None),
    ],
)
def test_a_split_name_can_have_a_year_or_number(name: str, split: str | None) -> None:
    assert parse_split_name(name) == split


def test_a_split_prefix_can_have_a_year() -> None:
    found = [parse_split_prefix(name) for name in ("train2017-000.tar", "training_1", "trains-1")]
    assert found == ["train", "train", None]


def coco(home: Path, below: str = "", prefix: str = "", train: int = 6, val: int = 24) -> Path:
    """COCO 2017 with five captions per image, in any order, and annotations of other tasks."""
    for place, (split, count) in enumerate((("train2017", train), ("val2017", val))):
        ids = [100 * place + number for number in range(count)]
        images = [{"id": n, "file_name": f"{prefix}{n:012d}.jpg", "license": 3} for n in ids]
        for n in ids:
            write_files(home, user_corpora.jpg(n), f"{below}{split}/{prefix}{n:012d}.jpg")
        annotations = [
            {"image_id": n, "id": 10 * n + c, "caption": f"caption {c} of {n}"}
            for c in range(5)
            for n in ids
        ]
        content = {
            "info": {"year": 2017},
            "licenses": [{"id": 3}],
            "images": images,
            "annotations": annotations,
        }
        (home / "annotations").mkdir(exist_ok=True)
        for kind in ("captions", "instances"):
            file = home / "annotations" / f"{kind}_{split}.json"
            file.write_text(json.dumps(content), "utf-8")
    write_files(home, b"x", f"{below}test2017/900.jpg")
    return home


@pytest.mark.parametrize("below", ["", "images/"])
def test_coco_captions(tmp_path: Path, below: str) -> None:
    corpus = detected(coco(tmp_path, below, prefix="COCO_"))
    assert (corpus.modality, corpus.task) == ("image", "text_to_image")
    rows, reasons = read(corpus)
    assert reasons["a media file that no row refers to"] == 1
    assert names(rows, "train") == {f"COCO_{n:012d}.jpg" for n in range(6)}
    # Without a test, half of the validation images become the test.
    assert len(names(rows, "validation") | names(rows, "test")) == 24
    assert not names(rows, "validation") & names(rows, "test")
    assert captions_of(rows, "COCO_000000000003.jpg") == {f"caption {c} of 3" for c in range(5)}
    assert media(rows["train"][0])[:2] == b"\xff\xd8"
    assert unread(corpus) == (
        "annotations/instances_train2017.json, annotations/instances_val2017.json"
    )


def test_coco_with_one_of_its_image_folders(tmp_path: Path) -> None:
    coco(tmp_path, train=1)
    (tmp_path / "train2017" / f"{0:012d}.jpg").unlink()
    (tmp_path / "train2017").rmdir()
    corpus = detected(tmp_path)
    rows, _ = read(corpus)
    assert len({name for split in rows for name in names(rows, split)}) == 24
    assert "annotations/captions_train2017.json" in unread(corpus)


def test_a_damaged_file_of_coco_is_reported(tmp_path: Path) -> None:
    coco(tmp_path)
    (tmp_path / "annotations" / "captions_train2017.json").write_text('{"images": [{"id": 1}')
    rows, reasons = read(detected(tmp_path))
    assert set(rows) == {"validation", "test"}
    assert reasons["JSON damaged from here on"] == 1


TOKENS = [(f"{n}.jpg", f"A {word} dog , running {n} .") for n in range(30) for word in "ab"]


@pytest.mark.parametrize("images", ["Images", "flickr30k-images", ""])
@pytest.mark.parametrize(
    ("file", "head", "line"),
    [
        ("results_20130124.token", "", "{name}#{number}\t{caption}\n"),
        ("Flickr8k_text/Flickr8k.token.txt", "", "{name}#{number}\t{caption}\n"),
        ("captions.txt", "image,caption\n", '{name},"{caption}"\n'),
        ("results.csv", "image_name| comment_number| comment\n", "{name}| {number}| {caption}\n"),
    ],
)
def test_flickr_captions(tmp_path: Path, images: str, file: str, head: str, line: str) -> None:
    for number in range(30):
        write_files(tmp_path / images, user_corpora.jpg(number), f"{number}.jpg")
    (tmp_path / file).parent.mkdir(exist_ok=True)
    lines = (
        line.format(name=name, number=number % 2, caption=caption)
        for number, (name, caption) in enumerate(TOKENS)
    )
    (tmp_path / file).write_text(head + "".join(lines), "utf-8")
    write_files(tmp_path, b"x", "ExpertAnnotations.txt", "readme.txt")
    corpus = detected(tmp_path, {"validation": 0.3, "test": 0.3})
    assert corpus.task == "text_to_image"
    rows, reasons = read(corpus)
    assert set(reasons) <= {"joined to the first row of its media file"}
    assert set(rows) == {"train", "validation", "test"}
    assert len({name for split in rows for name in names(rows, split)}) == 30
    assert captions_of(rows, "/7.jpg") == {caption for name, caption in TOKENS if name == "7.jpg"}
    assert unread(corpus) == "ExpertAnnotations.txt"


@pytest.mark.parametrize("fields", [2, 3])
def test_ljspeech(tmp_path: Path, fields: int) -> None:
    lines = []
    for number in range(40):
        write_files(tmp_path, user_corpora.wav(number), f"wavs/LJ001-{number:04d}.wav")
        texts = [f'"No. {number}, he said', f'"Number {number}, he said'][: fields - 1]
        lines.append("|".join([f"LJ001-{number:04d}", *texts]))
    (tmp_path / "metadata.csv").write_text("\n".join(lines) + "\n", "utf-8")
    corpus = detected(tmp_path)
    assert corpus.task == "speech_recognition"
    rows, reasons = read(corpus)
    assert not reasons
    assert sum(sizes(rows).values()) == 40
    assert set(rows) == {"train", "validation", "test"}
    word = "No." if fields == 2 else "Number"
    first = next(row for each in rows.values() for row in each if row["row"] == 1)
    assert first["text"] == f'"{word} 0, he said'
    assert first["media"]["path"].endswith("wavs/LJ001-0000.wav")
    source = inspection.inspect_corpus(str(tmp_path))["source"]
    assert source["file_name"] == "LJ001-0000.wav"
    assert source["text"] == f'"{word} 0, he said'


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
