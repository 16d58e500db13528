"""Layouts of the paper's corpora beyond the golden ones: packed files, damage and messages."""

import gzip
import json
from pathlib import Path

import pytest

from pipelines.data.config.corpus_options import rewrite_corpus_options
from pipelines.data.corpora import open_external_corpus
from pipelines.data.preprocessing import inspection
from skillnet_corpora.paper import LABELS, parse_youtube_id
from skillnet_platform.errors import UserError
from tests.helpers import user_corpora
from tests.helpers.archive_files import tarred
from tests.helpers.corpus_rows import read, sizes


def test_classes_are_those_of_clue() -> None:
    codes = [int(code) for code in LABELS]
    assert codes == [code for code in range(100, 117) if code not in (105, 111)]


def test_a_truncated_archive_costs_only_its_rows(tmp_path: Path) -> None:
    folder = user_corpora.aishell1(tmp_path)
    (packed,) = folder.rglob("train/*.tar.gz")
    packed.write_bytes(packed.read_bytes()[: packed.stat().st_size // 2])
    rows, reasons = read(open_external_corpus("aishell1", str(folder)))
    assert reasons["the speaker's archive is cut short or damaged"] == 1
    assert 11 <= len(rows["train"]) < 15
    assert sizes(rows)["test"] == 4


@pytest.mark.parametrize(
    ("name", "youtube"),
    [
        ("a_b-c_000122_000132", "a_b-c"),
        ("-_____-_000122_000132", "-_____-"),
        ("plain", "plain"),
        ("a_1_b", "a_1_b"),
    ],
)
def test_a_youtube_id_ends_before_the_last_two_numbers(name: str, youtube: str) -> None:
    assert parse_youtube_id(name) == youtube


def test_pytorrent_rows(tmp_path: Path) -> None:
    corpus = open_external_corpus("pytorrent", str(user_corpora.pytorrent(tmp_path)))
    rows, reasons = read(corpus)
    assert not reasons
    assert sizes(rows) == {"test": 5, "train": 12, "validation": 5}
    assert rows["train"][0]["captions"] == ["读取文件0的函数，见"]
    named = open_external_corpus("mine", f"pytorrent:{tmp_path}", {"docstring": "docstring_zh"})
    rows, _ = read(named)
    assert rows["train"][0]["captions"] == ["读取一个文件"]
    assert named.name == "mine"


def test_codesearchnet_rows(tmp_path: Path) -> None:
    folder = user_corpora.codesearchnet(tmp_path)
    (file,) = folder.rglob("python_train_1.jsonl.gz")
    file.write_bytes(file.read_bytes()[:-40])
    lines = user_corpora.code_rows(3, 500)
    lines[0]["language"], lines[1]["docstring"], lines[2]["code"] = "java", "x", ""
    del lines[2]["original_string"]
    user_corpora.write_lines(file.with_name("python_train_2.jsonl.gz"), lines)
    rows, reasons = read(open_external_corpus("codesearchnet", str(folder)))
    assert reasons == {
        "the compressed file is cut short or damaged": 1,
        "of another language": 1,
        "a docstring that is too short": 1,
        "no field code": 1,
    }
    assert sizes(rows)["test"] == 6
    assert len(rows["train"]) >= 7
    capital = open_external_corpus("codesearchnet", str(folder), {"language": "Python"})
    assert read(capital) == (rows, reasons)


@pytest.mark.parametrize("reader", ["tnews", "aic_icc", "vatex", "pytorrent", "folder", None])
def test_archives_must_be_unpacked(tmp_path: Path, reader: str | None) -> None:
    (tmp_path / "corpus.ZIP").write_bytes(b"PK")
    place = f"{reader}:{tmp_path}" if reader else str(tmp_path)
    with pytest.raises(UserError, match=r"\. corpus\.ZIP is an archive: unpack it"):
        inspection.inspect_corpus(place)


@pytest.mark.parametrize("packed", [False, True])
def test_missing_splits_are_made_by_speaker(tmp_path: Path, packed: bool) -> None:
    wav = tmp_path / "data_aishell" / "wav"
    wav.mkdir(parents=True)
    said = []
    for number in range(40):
        names = [f"BAC009S{number:04d}W{n:04d}" for n in range(3)]
        said += [f"{name} 今天 天气\n" for name in names]
        if packed:
            files = {f"S{number:04d}/{name}.wav": b"sound" for name in names}
            (wav / f"S{number:04d}.tar.gz").write_bytes(tarred(files))
            continue
        (wav / f"S{number:04d}").mkdir()
        for name in names:
            (wav / f"S{number:04d}" / f"{name}.wav").write_bytes(b"sound")
    (wav.parent / "transcript").mkdir()
    (wav.parent / "transcript" / "aishell_transcript_v0.8.txt").write_text("".join(said))
    corpus = open_external_corpus("aishell1", str(tmp_path))
    rows, reasons = read(corpus)
    assert not reasons
    speakers = {s: {row["key"][-13:-8] for row in each} for s, each in rows.items()}
    assert set(speakers) == {"train", "validation", "test"}
    assert sum(map(len, speakers.values())) == 40
    corpus.scan_labels()
    assert corpus.symbols == ("<unk>", *sorted("今天气"))


def test_a_docstring_field_of_another_name_is_suggested(tmp_path: Path) -> None:
    user_corpora.pytorrent(tmp_path)
    for file in tmp_path.rglob("*.jsonl.gz"):
        lines = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
        user_corpora.write_lines(file, [r for r in lines if r.pop("docstring")])
    with pytest.raises(UserError, match=r"--options\.pytorrent\.docstring docstring_zh$"):
        inspection.inspect_corpus(str(tmp_path))
    options = {"pytorrent": {"docstring": "docstring_zh"}}
    assert inspection.inspect_corpus(str(tmp_path), options)["rejected"] == {}


def test_names_of_corpora_are_checked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown corpus 'tnew'.*'tnews'.*tnew=FORMAT:/x"):
        open_external_corpus("tnew", "/x")
    with pytest.raises(UserError, match=r"--corpus tnews is given twice.*NAME=FORMAT:/b"):
        rewrite_corpus_options(["--corpus", "tnews=/a", "--corpus=tnews=/b"])
