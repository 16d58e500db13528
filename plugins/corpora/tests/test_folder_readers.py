"""Formats ``folder`` and ``webdataset`` beyond the golden layouts, and every reader in a store.

Damaged and malicious tars, stores, links, and tables whose columns repeat a name.
"""

import gzip
import io
import json
import os
import shutil
import subprocess
import tarfile
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.corpora import open_external_corpus
from pipelines.data.preprocessing import inspection
from skillnet_corpora.readers.fields import parse_split_name, parse_split_prefix
from skillnet_corpora.readers.webdataset import SPARSE_MEMBER
from skillnet_platform.errors import UserError
from tests.helpers import user_corpora
from tests.helpers.archive_files import tarred
from tests.helpers.corpus_rows import Rows, media, read, sizes
from tests.helpers.golden_layouts import write_files


class TestFolder:
    def test_given_metadata_lie_beside_their_media(self, tmp_path: Path) -> None:
        folder = user_corpora.media_folder(tmp_path, rows=5)
        (folder / "metadata.jsonl").rename(folder / "index.jsonl")
        corpus = open_external_corpus("mine", f"folder:{folder / 'index.jsonl'}")
        rows, reasons = read(corpus)
        assert not reasons
        assert all(media(row)[:4] == b"RIFF" for each in rows.values() for row in each)
        before = corpus.extra_sources()
        (folder / "data" / "0.wav").write_bytes(b"another")
        assert corpus.extra_sources() != before


class TestWebDataset:
    def test_a_truncated_tar_loses_only_its_end(self, tmp_path: Path) -> None:
        folder = user_corpora.webdataset(tmp_path)
        tar = folder / "train-000000.tar"
        with tarfile.open(tar) as archive:
            cut = archive.getmembers()[10].offset_data + 5
        tar.write_bytes(tar.read_bytes()[:cut])
        rows, reasons = read(open_external_corpus("webdataset", str(folder)))
        assert reasons == {"the archive is cut short or damaged from here on": 1}
        assert len(rows["train"]) + len(rows.get("validation", [])) == 17

    @pytest.mark.parametrize("name", ["train-000000.tar", "train-000000.tar.gz"])
    def test_a_malicious_tar_loses_only_its_end(self, tmp_path: Path, name: str) -> None:
        """A name of 8 MB, which Python would read into memory for any declared length."""
        target = io.BytesIO()
        with tarfile.open(fileobj=target, mode="w:gz" if name.endswith("gz") else "w") as out:
            for n in range(3):
                for ending, data in ((f"{n}.jpg", user_corpora.jpg(n)), (f"{n}.txt", b"word")):
                    entry = tarfile.TarInfo(ending)
                    entry.size = len(data)
                    out.addfile(entry, io.BytesIO(data))
            flood = tarfile.TarInfo("././@LongLink")
            flood.type, flood.size = tarfile.GNUTYPE_LONGNAME, 8 * 2**20
            out.addfile(flood, io.BytesIO(os.urandom(flood.size)))
        (tmp_path / name).write_bytes(target.getvalue())
        rows, reasons = read(open_external_corpus("webdataset", str(tmp_path)))
        why = "a name or an attribute of a member is a flood of bytes"
        assert reasons == {f"the archive is refused: {why} from here on": 1}
        assert sum(map(len, rows.values())) == 2


def test_a_corpus_in_a_bucket_gives_the_same_rows(tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    for name in ("vatex", "aishell1", "webdataset", "pytorrent"):
        builder = getattr(user_corpora, name)
        local = builder(tmp_path / name)
        store.put(str(local), f"/bucket/{name}", recursive=True)
        here = open_external_corpus(name, str(local))
        there = open_external_corpus(name, f"memory://bucket/{name}")
        (rows, reasons), (far, far_reasons) = read(here), read(there)
        assert reasons == far_reasons
        assert sizes(rows) == sizes(far)
        assert [row["key"] for row in rows["train"]] == [row["key"] for row in far["train"]]
        assert here.extra_sources() == there.extra_sources()
        if "media" in rows["train"][0]:
            assert [media(row) for row in rows["train"]] == [media(row) for row in far["train"]]
        shutil.rmtree(local)


def test_samples_become_the_columns_of_the_model(tmp_path: Path) -> None:
    corpus = open_external_corpus(
        "webdataset", str(user_corpora.webdataset(tmp_path)), {"size": 32}
    )
    from pipelines.data.tokenizer import training as tokenizer_training

    rows, _ = read(corpus)
    block = pa.Table.from_pylist(rows["test"], schema=corpus.raw_schema)
    (tmp_path / "t.json").write_text(
        tokenizer_training.train_tokenizer(["红色的方块"], [], size=600), "utf-8"
    )
    made = corpus.transform(block, tokenizer_training.load_tokenizer(tmp_path / "t.json"))
    assert made["rejected"].null_count == 12
    assert np.array(made["pixels"][0].as_py()).size == 32 * 32 * 3
    assert made.schema.names == [*corpus.columns.names, "rejected"]


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


def splits_of(rows: Rows, named: str) -> set[str]:
    """Return the splits of rows whose path contains a name."""
    return {s for s, each in rows.items() for row in each if named in row["media"]["path"]}


def test_one_metadata_file_with_media_in_split_folders(tmp_path: Path) -> None:
    said = [{"file_name": f"train/{n}.jpg", "caption": f"图{n}"} for n in range(1200)]
    said += [{"file_name": f"Test/{n}.jpg", "caption": f"图{n}"} for n in range(10)]
    write_files(tmp_path, dict.fromkeys(row["file_name"] for row in said))
    user_corpora.write_lines(tmp_path / "metadata.jsonl", said)
    rows, reasons = read(open_external_corpus("mine", f"folder:{tmp_path}"))
    assert not reasons
    assert splits_of(rows, "/Test/") == {"test"}  # although the sampled rows contain none
    assert splits_of(rows, "/train/") == {"train", "validation"}
    assert inspection.inspect_corpus(str(tmp_path))["named_splits"] == ["test", "train"]


def test_paths_that_lead_out_are_rejected(tmp_path: Path) -> None:
    names = ["/etc/passwd", "../../x.wav", "data/../../x.wav", "file:///etc/passwd", "a\0b", ""]
    write_files(tmp_path / "in", {"1.wav": None})
    lines = [{"file_name": name, "transcription": "x"} for name in ("1.wav", *names)]
    user_corpora.write_lines(tmp_path / "in" / "metadata.jsonl", lines)
    _, reasons = read(open_external_corpus("folder", str(tmp_path / "in")))
    assert reasons == {
        "a path that leads out of the folder": 4,
        "a path with a null character": 1,
        "no file name": 1,
    }


def test_absolute_paths_below_the_directory(tmp_path: Path) -> None:
    home, link = tmp_path / "real", tmp_path / "link"
    write_files(home, dict.fromkeys(("train/1.jpg", "test/2.jpg", "test/3.jpg", "../out.jpg")))
    link.symlink_to(home)
    names = [str(home / "train/1.jpg"), str(home / "test/../test/2.jpg"), str(link / "test/3.jpg")]
    names += [str(tmp_path / "out.jpg"), str(home / "../out.jpg"), "/etc/passwd"]
    rows_of = [{"file_name": name, "caption": "图"} for name in names]
    user_corpora.write_lines(home / "metadata.jsonl", rows_of)
    rows, reasons = read(open_external_corpus("mine", f"folder:{link}"))
    assert reasons == {"a path that leads out of the folder": 3}
    assert {split: len(each) for split, each in rows.items()} == {"train": 1, "test": 2}
    assert splits_of(rows, str(link)) == {"train", "test"}


@pytest.mark.parametrize(
    "header", ["text,label,text", "text, label ,label", "id,text,label,id", "text,label,x,y,x"]
)
def test_two_columns_of_one_name_are_refused(tmp_path: Path, header: str) -> None:
    names = [name.strip() for name in header.split(",")]
    repeated = next(name for name in names if names.count(name) > 1)
    first, second = (n for n, name in enumerate(names, start=1) if name == repeated)
    message = f"the columns {first} and {second} are both called {repeated}"
    arrays = [pa.array(["x", "y"] * 6) for _ in names]
    table = pa.Table.from_arrays(arrays, names=names)
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=message):
        open_external_corpus("mine", f"folder:{tmp_path}/rows.parquet")
    write_files(tmp_path, {"saved": [{"text": "x", "label": "y"}]})
    (tmp_path / "saved" / "data-00000-of-00001.arrow").unlink()
    with pa.ipc.new_stream(tmp_path / "saved" / "data-00000-of-00001.arrow", table.schema) as out:
        out.write_table(table)
    _, reasons = read(open_external_corpus("mine", f"hf_dataset:{tmp_path}/saved"))
    assert list(reasons) == [f"{message}; rename one of them"]


def sample_files(count: int) -> dict[str, bytes]:
    found = {}
    for n in range(count):
        found |= {f"{n}.jpg": b"picture %d" % n, f"{n}.txt": b"words %d" % n}
    return found


def test_the_first_bytes_decide_the_compression(tmp_path: Path) -> None:
    packed = tarred(sample_files(5))
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
    for name, data in sample_files(3).items():
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
    (tmp_path / "x.tar.gz").write_bytes(tarred(files))
    rows, reasons = read(open_external_corpus("webdataset", str(tmp_path)))
    assert reasons == {"more than 1000 captions": 1}
    assert sum(len(each) for each in rows.values()) == 2
