"""Variants of the paper's corpora: packed, unpacked deeper, in capitals, or in part."""

import gzip
import json
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from pipelines.data.config.corpus_options import rewrite_corpus_options
from pipelines.data.corpora import detect_reader, open_external_corpus
from pipelines.data.corpora.base import RejectedRow, SourceArchives
from pipelines.data.io.directory import SourceDirectory
from pipelines.data.preprocessing import inspection
from skillnet_platform.errors import UserError
from tests.helpers import user_corpora
from tests.helpers.archive_files import tarred
from tests.helpers.corpus_rows import media, read, sizes


@pytest.mark.parametrize("reader", ["tnews", "aic_icc", "vatex", "pytorrent", "folder", None])
def test_archives_must_be_unpacked(tmp_path: Path, reader: str | None) -> None:
    (tmp_path / "corpus.ZIP").write_bytes(b"PK")
    place = f"{reader}:{tmp_path}" if reader else str(tmp_path)
    with pytest.raises(UserError, match=r"\. corpus\.ZIP is an archive: unpack it"):
        inspection.inspect_corpus(place)


class TestAishell:
    @pytest.mark.parametrize("packed", [False, True])
    def test_missing_splits_are_made_by_speaker(self, tmp_path: Path, packed: bool) -> None:
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

    def test_a_speaker_outside_of_given_splits_is_counted(self, tmp_path: Path) -> None:
        folder = user_corpora.aishell1(tmp_path)
        wav = folder / "data_aishell" / "wav"
        (wav / "train" / "S0002").rename(wav / "S0002")
        (wav / "train").rename(wav / "Train")
        rows, reasons = read(open_external_corpus("aishell1", str(folder)))
        assert len(rows["train"]) == 12
        assert reasons["neither train, dev nor test in its path"] == 4

    @pytest.mark.parametrize("above", ["", "data_aishell"])
    def test_it_is_found_in_nested_directories(self, tmp_path: Path, above: str) -> None:
        folder = user_corpora.aishell1(tmp_path / "data_aishell")
        assert detect_reader(SourceDirectory(str(tmp_path / above))) is not None
        rows, _ = read(open_external_corpus("aishell1", str(tmp_path / above)))
        expected, _ = read(open_external_corpus("aishell1", str(folder)))
        assert sizes(rows) == sizes(expected)

    @pytest.mark.parametrize("part", ["wav", "wav/train", "transcript"])
    def test_a_part_of_the_corpus_is_reported(self, tmp_path: Path, part: str) -> None:
        whole = user_corpora.aishell1(tmp_path) / "data_aishell"
        with pytest.raises(UserError, match=f"only a part of AISHELL-1; give {whole}$"):
            inspection.inspect_corpus(str(whole / part))

    def test_the_download_must_be_unpacked(self, tmp_path: Path) -> None:
        file = tmp_path / "data_aishell.tgz"
        file.write_bytes(tarred({"data_aishell/wav/S0002.tar.gz": b"x"}))
        for place in (tmp_path, file):
            with pytest.raises(UserError, match=r"data_aishell\.tgz is an archive: unpack it"):
                inspection.inspect_corpus(str(place))

    def test_a_folder_without_speakers_is_reported(self, tmp_path: Path) -> None:
        folder = user_corpora.aishell1(tmp_path)
        shutil.rmtree(folder / "data_aishell" / "wav")
        (folder / "data_aishell" / "wav").mkdir()
        with pytest.raises(UserError, match="no folders or archives of speakers in it"):
            open_external_corpus("aishell1", str(folder))

    def test_files_of_macos_in_an_archive_are_ignored(self, tmp_path: Path) -> None:
        folder = user_corpora.aishell1(tmp_path)
        file = folder / "data_aishell" / "wav" / "S0004.tar.gz"
        with tarfile.open(file) as archive:
            names = archive.getnames()
        files = {f"train/S0004/._{Path(name).name}": b"x" for name in names}
        before, _ = read(open_external_corpus("aishell1", str(folder)))
        file.write_bytes(tarred(files | dict.fromkeys(names, b"sound")))
        rows, reasons = read(open_external_corpus("aishell1", str(folder)))
        assert sizes(rows) == sizes(before)
        assert reasons["audio without a transcript"] == 1


class TestAicIcc:
    @pytest.mark.parametrize("reported", [".jpg", ".JPG"])
    def test_endings_in_capitals_and_folders_unpacked_deeper(
        self, tmp_path: Path, reported: str
    ) -> None:
        folder = user_corpora.aic_icc(tmp_path)
        for number, path in enumerate(sorted(folder.rglob("*.jpg"))):
            deeper = path.parent / path.parent.name
            deeper.mkdir(exist_ok=True)
            path.rename(deeper / path.with_suffix((".JPG", ".jpg", ".Jpg")[number % 3]).name)
        for file in folder.rglob("*.json"):
            file.write_text(file.read_text("utf-8").replace('.jpg"', f'{reported}"'), "utf-8")
        rows, reasons = read(open_external_corpus("aic_icc", str(folder)))
        assert sizes(rows) == {"test": 5, "test_b": 5, "train": 11, "validation": 5}
        assert reasons == {"captions without an image": 1, "an image without captions": 1}
        assert all(media(row)[:2] == b"\xff\xd8" for each in rows.values() for row in each)

    def test_tests_without_captions_are_not_evaluated(self, tmp_path: Path) -> None:
        folder = user_corpora.aic_icc(tmp_path, other=30)
        before = open_external_corpus("aic_icc", str(folder)).extra_sources()
        for file in folder.rglob("*test*.json"):
            records = json.loads(file.read_text("utf-8"))
            file.write_text(json.dumps([{"image_id": r["image_id"]} for r in records]))
        corpus = open_external_corpus("aic_icc", str(folder))
        assert len(corpus.extra_sources()) == len(before)
        found = [row for row in corpus.rows(SourceArchives.none()) if isinstance(row, RejectedRow)]
        bare = [
            row.counts_as_error for row in found if row.reason == "a test image without captions"
        ]
        assert bare == [False] * 60
        rows, _ = read(corpus)
        assert len(rows["validation"]) + len(rows["test"]) == 30
        assert min(len(rows["test"]), len(rows["validation"])) > 5


@pytest.mark.parametrize(("kept", "asked"), [("enCap", "chinese"), ("chCap", "english")])
def test_captions_in_the_other_language_only(tmp_path: Path, kept: str, asked: str) -> None:
    folder = user_corpora.vatex(tmp_path)
    for file in folder.glob("*.json"):
        records = json.loads(file.read_text("utf-8"))
        fields = ("videoID", kept)
        file.write_text(json.dumps([{k: r[k] for k in fields if k in r} for r in records]))
    other = {"chinese": "english", "english": "chinese"}[asked]
    with pytest.raises(UserError, match=f"has {other} captions only. .*captions {other}"):
        open_external_corpus("vatex", str(folder), {"captions": asked})
    rows, _ = read(open_external_corpus("vatex", str(folder), {"captions": other}))
    assert {"train", "validation", "test"} == set(rows)


def test_tnews_as_a_json_array(tmp_path: Path) -> None:
    folder = user_corpora.tnews(tmp_path)
    expected, _ = read(open_external_corpus("tnews", str(folder)))
    for name in ("train", "dev", "test"):
        lines = (folder / f"{name}.json").read_text("utf-8").splitlines()
        whole = json.dumps([json.loads(line) for line in lines], indent=2)
        (folder / f"{name}.json").write_text(whole)
    assert detect_reader(SourceDirectory(str(folder))) is not None
    assert read(open_external_corpus("tnews", str(folder))) == (expected, Counter())


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
