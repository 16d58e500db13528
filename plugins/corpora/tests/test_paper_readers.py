"""Layouts of the paper's corpora: rows, splits, and rejected rows with their reasons."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest

from pipelines.data.corpora import (
    open_external_corpus,
)
from pipelines.data.corpora.base import RejectedRow, SourceArchives
from pipelines.data.io.media import MediaRef
from skillnet_corpora.paper import LABELS, parse_youtube_id
from tests.helpers import user_corpora
from tests.helpers.corpus_rows import media, read, sizes


class TestTnews:
    def test_labels_can_be_numbers_with_either_field_name(self, tmp_path: Path) -> None:
        corpus = open_external_corpus("tnews", str(user_corpora.tnews(tmp_path)))
        rows, reasons = read(corpus)
        assert not reasons
        assert len(rows["train"]) + len(rows["validation"]) == 60
        assert (len(rows["test"]), len(rows["unlabelled"])) == (15, 15)
        assert {row["label"] for row in rows["test"]} == set(corpus.labels)
        assert corpus.labels[6] == "107 news_car"
        assert "label" not in corpus.schema("unlabelled").names
        assert "label" in corpus.schema("test").names

    def test_a_test_with_labels_is_used_as_test(self, tmp_path: Path) -> None:
        folder = user_corpora.tnews(tmp_path)
        shutil.copy(folder / "dev.json", folder / "test.json")
        rows, _ = read(open_external_corpus("tnews", str(folder)))
        assert sizes(rows) == {"test": 15, "train": 60, "validation": 15}

    def test_a_bad_line_costs_only_itself(self, tmp_path: Path) -> None:
        folder = user_corpora.tnews(tmp_path, train=4)
        bad = [
            b'{"label": "102", "sentence": "cut in the mid',
            b'{"label": "102", "sentence": "\xff\xfe"}',
            b'{"label": "105", "sentence": "no such class"}',
            b'{"sentence": "no label"}',
            b'{"label": "102", "sentence": "  "}',
            b'{"label": "102", "sentence": "\\ud83d"}',
            b'["102"]',
        ]
        with (folder / "train.json").open("ab") as stream:
            stream.write(b"\n".join(bad))
        rows, reasons = read(open_external_corpus("tnews", str(folder)))
        assert len(rows["train"]) + len(rows.get("validation", [])) == 4
        assert reasons == {
            "not JSON": 1,
            "not UTF-8": 2,
            "a label that TNEWS does not have": 1,
            "no label": 1,
            "an empty text": 1,
            "not a JSON object": 1,
        }

    def test_splits_do_not_depend_on_the_given_path(self, tmp_path: Path) -> None:
        folder = user_corpora.tnews(tmp_path / "tnews_public")
        options = {"validation": 0.3}
        above, _ = read(open_external_corpus("tnews", str(tmp_path), options))
        here, _ = read(open_external_corpus("tnews", str(folder), options))
        keys = {split: [row["key"] for row in rows] for split, rows in here.items()}
        assert keys == {split: [row["key"] for row in rows] for split, rows in above.items()}
        assert {row["file"] for row in above["train"]} == {"tnews_public/train.json"}

    def test_keywords_are_optional(self, tmp_path: Path) -> None:
        corpus = open_external_corpus(
            "tnews", str(user_corpora.tnews(tmp_path)), {"keywords": True, "validation": 0.0}
        )
        rows, _ = read(corpus)
        assert len(rows["train"]) == 60
        assert rows["train"][0]["text"] == "news_story的新闻研究0 研究"

    def test_classes_are_those_of_clue(self) -> None:
        codes = [int(code) for code in LABELS]
        assert codes == [code for code in range(100, 117) if code not in (105, 111)]


class TestAishell:
    def test_speakers_in_folders_and_in_archives(self, tmp_path: Path) -> None:
        corpus = open_external_corpus("aishell1", str(user_corpora.aishell1(tmp_path)))
        rows, reasons = read(corpus)
        assert sizes(rows) == {"test": 4, "train": 15, "validation": 4}
        assert reasons == {
            "audio without a transcript": 1,
            "a transcript without audio": 1,
        }
        assert all(media(row)[:4] == b"RIFF" for row in rows["train"])
        kinds = {MediaRef(**row["media"]).member is None for row in rows["train"]}
        assert kinds == {True, False}
        assert all(" " not in row["text"] for row in rows["train"])

    def test_symbols_are_the_characters_of_training(self, tmp_path: Path) -> None:
        corpus = open_external_corpus(
            "aishell1", str(user_corpora.aishell1(tmp_path) / "data_aishell")
        )
        corpus.scan_labels()
        rows, _ = read(corpus)
        said = {c for row in rows["train"] for c in row["text"]}
        # A transcript without audio can add characters; no other row does.
        assert said <= set(corpus.symbols[1:]) <= said | set("没有录音")
        assert corpus.symbols[0] == "<unk>"
        assert corpus.facts()["blank"] == 0

    def test_a_truncated_archive_costs_only_its_rows(self, tmp_path: Path) -> None:
        folder = user_corpora.aishell1(tmp_path)
        (packed,) = folder.rglob("train/*.tar.gz")
        packed.write_bytes(packed.read_bytes()[: packed.stat().st_size // 2])
        rows, reasons = read(open_external_corpus("aishell1", str(folder)))
        assert reasons["the speaker's archive is cut short or damaged"] == 1
        assert 11 <= len(rows["train"]) < 15
        assert sizes(rows)["test"] == 4

    def test_a_speaker_both_unpacked_and_packed_is_read_once(self, tmp_path: Path) -> None:
        """Unpacked files are used; the archive supplies the other utterances."""
        folder = user_corpora.aishell1(tmp_path)
        (packed,) = folder.rglob("train/*.tar.gz")
        beside = folder / "data_aishell" / "wav" / "S0004.tar.gz"
        with tarfile.open(packed) as archive:
            archive.extractall(packed.parent, filter="data")
        with tarfile.open(beside) as archive:
            archive.extractall(beside.parent, filter="data")
        first = min((beside.parent / "train" / "S0004").iterdir())
        first.unlink()
        corpus = open_external_corpus("aishell1", str(folder))
        rows, reasons = read(corpus)
        assert sizes(rows) == {"test": 4, "train": 15, "validation": 4}
        assert reasons["audio without a transcript"] == 1
        members = {row["media"]["member"] for row in rows["train"]} - {None}
        assert [name.rpartition("/")[2] for name in members] == [first.name]
        beside.write_bytes(b"")
        _, reasons = read(corpus)
        assert reasons["a transcript without audio"] == 2

    @pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"\x1f\x8b"])
    def test_an_invalid_archive_is_named(self, tmp_path: Path, content: bytes) -> None:
        folder = user_corpora.aishell1(tmp_path)
        (folder / "data_aishell" / "wav" / "S0009.tar.gz").write_bytes(content)
        corpus = open_external_corpus("aishell1", str(folder))
        corpus.scan_labels()
        found = list(corpus.rows(SourceArchives.none()))
        (bad,) = [row for row in found if isinstance(row, RejectedRow) and row.truncates_file]
        assert (bad.file, bad.counts_as_error) == ("data_aishell/wav/S0009.tar.gz", True)
        assert bad.reason == "the speaker's archive is cut short or damaged"
        assert len([row for row in found if not isinstance(row, RejectedRow)]) == 23

    def test_tabs_and_upper_case_endings(self, tmp_path: Path) -> None:
        folder = user_corpora.aishell1(tmp_path)
        for path in list(folder.rglob("*.wav")):
            path.rename(path.with_suffix(".WAV"))
        (file,) = folder.rglob("aishell_transcript*")
        lines = [line.replace(" ", "\t", 1) for line in file.read_text("utf-8").splitlines()]
        file.write_text("\n".join(lines), "utf-8")
        rows, _ = read(open_external_corpus("aishell1", str(folder)))
        assert sizes(rows) == {"test": 4, "train": 15, "validation": 4}

    def test_every_row_names_its_transcript_line(self, tmp_path: Path) -> None:
        folder = user_corpora.aishell1(tmp_path)
        (file,) = folder.rglob("aishell_transcript*")
        lines = file.read_text("utf-8").splitlines()
        lines[3] = lines[3].split(" ")[0]
        file.write_text("\n".join(lines), "utf-8")
        corpus = open_external_corpus("aishell1", str(folder))
        name = "data_aishell/transcript/aishell_transcript_v0.8.txt"
        for row in corpus.rows(SourceArchives.none()):
            if not isinstance(row, RejectedRow):
                assert row["file"] == name
                assert lines[row["row"] - 1].split(" ")[0] in row["key"]
            elif row.reason != "audio without a transcript":
                assert row.file == name
                assert row.row is not None
                assert lines[row.row - 1].split(" ")[0] in row.key


class TestAicIcc:
    def test_images_with_all_of_their_captions(self, tmp_path: Path) -> None:
        rows, reasons = read(open_external_corpus("aic_icc", str(user_corpora.aic_icc(tmp_path))))
        assert sizes(rows) == {"test": 5, "test_b": 5, "train": 11, "validation": 5}
        assert reasons == {"captions without an image": 1, "an image without captions": 1}
        assert all(len(row["captions"]) == 5 for row in rows["train"])
        assert media(rows["test"][0])[:2] == b"\xff\xd8"

    def test_without_tests_validation_is_divided(self, tmp_path: Path) -> None:
        folder = user_corpora.aic_icc(tmp_path, other=30)
        for part in ("a", "b"):
            shutil.rmtree(folder / f"ai_challenger_caption_test_{part}_20180103")
        rows, _ = read(open_external_corpus("aic_icc", str(folder)))
        assert len(rows["test"]) + len(rows["validation"]) == 30
        assert min(len(rows["test"]), len(rows["validation"])) > 5

    def test_paths_that_lead_out_and_truncated_json(self, tmp_path: Path) -> None:
        folder = user_corpora.aic_icc(tmp_path, train=6)
        (file,) = folder.rglob("caption_train_annotations*.json")
        records = json.loads(file.read_text(encoding="utf-8"))
        records[1]["image_id"] = "/etc/passwd"
        records[2]["image_id"] = "../../x.jpg"
        file.write_text(json.dumps(records)[:-60], encoding="utf-8")
        rows, reasons = read(open_external_corpus("aic_icc", str(folder)))
        assert reasons["a path that leads out of the folder"] == 2
        assert reasons["JSON damaged from here on (cut short)"] == 1
        assert sizes(rows)["test"] == 5

    @pytest.mark.parametrize("elsewhere", [False, True])
    def test_images_of_all_splits_in_one_folder(self, tmp_path: Path, elsewhere: bool) -> None:
        folder = user_corpora.aic_icc(tmp_path / "a")
        flat = tmp_path / "flat"
        flat.mkdir()
        for path in [*folder.rglob("*.jpg"), *([] if elsewhere else folder.rglob("*.json"))]:
            path.rename(flat / path.name)
        options = {"media": str(flat)} if elsewhere else {}
        corpus = open_external_corpus("aic_icc", str(folder if elsewhere else flat), options)
        rows, reasons = read(corpus)
        assert sizes(rows) == {"test": 5, "test_b": 5, "train": 11, "validation": 5}
        assert reasons == {"captions without an image": 1, "an image without captions": 1}
        assert media(rows["train"][0])[:2] == b"\xff\xd8"

    def test_every_row_names_its_file_and_number(self, tmp_path: Path) -> None:
        corpus = open_external_corpus("aic_icc", str(user_corpora.aic_icc(tmp_path)))
        for row in corpus.rows(SourceArchives.none()):
            if not isinstance(row, RejectedRow):
                records = json.loads((tmp_path / row["file"]).read_text("utf-8"))
                assert row["key"].endswith(records[row["row"] - 1]["image_id"])
            elif row.counts_as_error:
                assert row.row == 1  # its image was removed


class TestVatex:
    @pytest.mark.parametrize("merged", [False, True])
    def test_array_or_object_with_videos_anywhere(self, tmp_path: Path, merged: bool) -> None:
        corpus = open_external_corpus("vatex", str(user_corpora.vatex(tmp_path, merged)))
        rows, reasons = read(corpus)
        assert reasons == {"captions without a video": 1, "a video without captions": 9}
        assert len(rows["train"]) + len(rows["validation"]) + len(rows["test"]) == 17
        assert rows["test"]
        assert rows["validation"]
        assert all(len(row["captions"]) == 10 for row in rows["train"])
        assert rows["train"][0]["captions"][0].startswith("写")
        assert media(rows["train"][0])[4:8] == b"ftyp"

    def test_english_uses_the_public_test(self, tmp_path: Path) -> None:
        folder = user_corpora.vatex(tmp_path)
        rows, reasons = read(open_external_corpus("vatex", str(folder), {"captions": "english"}))
        assert sizes(rows) == {"test": 8, "train": 9, "validation": 8}
        assert reasons["a video without captions"] == 1
        both, _ = read(open_external_corpus("vatex", str(folder), {"captions": "both"}))
        assert {len(row["captions"]) for each in both.values() for row in each} == {20}
        assert len(both["test"]) + len(both["validation"]) == 8  # the public test has no Chinese

    def test_unusual_records_are_rejected(self, tmp_path: Path) -> None:
        folder = user_corpora.vatex(tmp_path)
        (file,) = folder.glob("vatex_training*")
        records = json.loads(file.read_text("utf-8"))
        del records[1]["videoID"]
        records[2]["chCap"] = "一句话"
        file.write_text(json.dumps(records), "utf-8")
        corpus = open_external_corpus("vatex", str(folder))
        found = list(corpus.rows(SourceArchives.none()))
        (nameless,) = [row for row in found if isinstance(row, RejectedRow) and "ID" in row.reason]
        assert (nameless.reason, nameless.file, nameless.row) == ("no videoID", file.name, 2)
        rows, _ = read(corpus)
        (one,) = [row for row in rows["train"] if row["row"] == 3]
        assert (one["captions"], one["file"]) == (["一句话"], file.name)

    def test_videos_in_another_folder(self, tmp_path: Path) -> None:
        folder = user_corpora.vatex(tmp_path / "a")
        (folder / "clips").rename(tmp_path / "elsewhere")
        rows, reasons = read(open_external_corpus("vatex", str(folder)))
        assert reasons["captions without a video"] > 1
        (folder / "more").rename(tmp_path / "elsewhere" / "more")
        options = {"media": str(tmp_path / "elsewhere")}
        rows, reasons = read(open_external_corpus("vatex", str(folder), options))
        assert reasons["captions without a video"] == 1
        assert len(rows["train"]) == 9

    @pytest.mark.parametrize(
        ("name", "youtube"),
        [
            ("a_b-c_000122_000132", "a_b-c"),
            ("-_____-_000122_000132", "-_____-"),
            ("plain", "plain"),
            ("a_1_b", "a_1_b"),
        ],
    )
    def test_a_youtube_id_ends_before_the_last_two_numbers(self, name: str, youtube: str) -> None:
        assert parse_youtube_id(name) == youtube


class TestCode:
    def test_pytorrent_rows(self, tmp_path: Path) -> None:
        corpus = open_external_corpus("pytorrent", str(user_corpora.pytorrent(tmp_path)))
        rows, reasons = read(corpus)
        assert not reasons
        assert sizes(rows) == {"test": 5, "train": 12, "validation": 5}
        assert rows["train"][0]["captions"] == ["读取文件0的函数，见"]
        named = open_external_corpus("mine", f"pytorrent:{tmp_path}", {"docstring": "docstring_zh"})
        rows, _ = read(named)
        assert rows["train"][0]["captions"] == ["读取一个文件"]
        assert named.name == "mine"

    def test_the_docstring_is_removed_for_a_translated_query(self, tmp_path: Path) -> None:
        from pipelines.data.transforms.code import remove_docstring

        for row in user_corpora.code_rows(3):
            assert "函数" not in remove_docstring(row["code"])
        python_2 = 'def f(x):\n    """Says it."""\n    print x\n'
        assert remove_docstring(python_2) == "def f(x):\n    print x"

    def test_codesearchnet_rows(self, tmp_path: Path) -> None:
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
