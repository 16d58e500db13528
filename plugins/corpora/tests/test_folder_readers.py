"""Formats ``folder`` and ``webdataset`` for any modality, and every reader in a store."""

import csv
import gzip
import io
import json
import os
import shutil
import tarfile
import unicodedata
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.corpora import detect_reader, open_external_corpus
from pipelines.data.corpora.base import RejectedRow, SourceArchives
from pipelines.data.io.directory import SourceDirectory
from pipelines.data.io.media import MediaReadError, read_media
from skillnet_platform.errors import UserError
from tests.helpers import user_corpora
from tests.helpers.archive_files import tarred
from tests.helpers.corpus_rows import media, read, sizes


class TestFolder:
    def test_audio_with_metadata(self, tmp_path: Path) -> None:
        folder = user_corpora.media_folder(tmp_path)
        (folder / "data" / "extra.wav").write_bytes(user_corpora.wav(1))
        (folder / "data" / "3.wav").unlink()
        corpus = open_external_corpus("mine", f"folder:{folder}", {"test": 0.2})
        assert (corpus.modality, corpus.task) == ("sound", "speech_recognition")
        rows, reasons = read(corpus)
        assert reasons == {"the media file is missing": 1, "a media file that no row refers to": 1}
        assert sum(sizes(rows).values()) == 11
        assert media(rows["train"][0])[:4] == b"RIFF"

    def test_made_splits_keep_speakers_together(self, tmp_path: Path) -> None:
        folder = user_corpora.media_folder(tmp_path, rows=24)
        options = {"split_by": "speaker", "test": 0.4, "validation": 0.3}
        rows, _ = read(open_external_corpus("mine", f"folder:{folder}", options))
        homes: dict[str, set[str]] = {}
        for split, each in rows.items():
            for row in each:
                number = int(row["key"].rpartition(":")[2]) - 1
                homes.setdefault(f"s{number % 3}", set()).add(split)
                assert row["unit"] == f"s{number % 3}"
        assert all(len(home) == 1 for home in homes.values())

    def test_a_common_field_of_the_speaker_names_the_unit(self, tmp_path: Path) -> None:
        """Without splits by speaker, the rows of a speaker are similar all the same."""
        folder = user_corpora.media_folder(tmp_path, rows=6)
        rows, _ = read(open_external_corpus("mine", f"folder:{folder}"))
        every = [row for each in rows.values() for row in each]
        assert {row["unit"] for row in every} == {"s0", "s1", "s2"}

    def test_a_row_without_the_split_by_field_is_rejected(self, tmp_path: Path) -> None:
        """Otherwise all rows without the field would share one split."""
        folder = user_corpora.media_folder(tmp_path, rows=4)
        with (folder / "metadata.jsonl").open("a") as out:
            out.write('{"file_name": "data/1.wav", "transcription": "x"}\n')
        _, reasons = read(open_external_corpus("mine", f"folder:{folder}", {"split_by": "speaker"}))
        assert reasons == {"no field speaker, which splits are made by": 1}

    @pytest.mark.parametrize("kind", ["csv", "parquet", "json"])
    def test_rows_are_counted_from_one(self, tmp_path: Path, kind: str) -> None:
        lines = [{"text": f"第{n}条", "label": "x"} for n in range(3)] + [
            {"text": "", "label": "x"}
        ]
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(lines), tmp_path / "rows.parquet")
        elif kind == "json":
            (tmp_path / "rows.json").write_text(json.dumps(lines))
        else:
            text = "text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in lines)
            (tmp_path / "rows.csv").write_text(text, "utf-8")
        corpus = open_external_corpus("mine", f"folder:{tmp_path / f'rows.{kind}'}")
        found = list(corpus.rows(SourceArchives.none()))
        first = 2 if kind == "csv" else 1  # rows of a CSV file are numbered by line
        numbers = [row.row if isinstance(row, RejectedRow) else row["row"] for row in found]
        assert numbers == [first, first + 1, first + 2, first + 3]
        assert isinstance(found[-1], RejectedRow)

    def test_metadata_can_hold_the_rows(self, tmp_path: Path) -> None:
        folder = user_corpora.media_folder(tmp_path, rows=3)
        rows, _ = read(open_external_corpus("folder", str(folder)))
        every = [row for each in rows.values() for row in each]
        assert {row["file"] for row in every} == {"metadata.jsonl"}
        assert all(row["media"]["path"].endswith(f"/{row['row'] - 1}.wav") for row in every)

    @pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
    def test_images_in_split_folders(self, tmp_path: Path, kind: str) -> None:
        for place, (split, count) in enumerate((("train", 40), ("validation", 20))):
            home = tmp_path / split
            home.mkdir()
            lines = []
            for number in range(count):
                (home / f"{number}.jpg").write_bytes(user_corpora.jpg(number + place))
                lines.append({"file_name": f"{number}.jpg", "text": f"图{number + 100 * place}"})
            if kind == "csv":
                with (home / "metadata.csv").open("w", newline="", encoding="utf-8-sig") as out:
                    writer = csv.DictWriter(out, ["file_name", "text"])
                    writer.writeheader()
                    writer.writerows(lines)
            elif kind == "parquet":
                pq.write_table(pa.Table.from_pylist(lines), home / "metadata.parquet")
            else:
                user_corpora.write_lines(home / "metadata.jsonl", lines)
        corpus = open_external_corpus("folder", str(tmp_path))
        assert corpus.task == "text_to_image"
        rows, reasons = read(corpus)
        assert not reasons
        assert len(rows["train"]) == 40
        # The missing test is made: it is half of the validation rows.
        assert len(rows["test"]) + len(rows["validation"]) == 20
        assert min(len(rows["test"]), len(rows["validation"])) > 2

    def test_class_folders(self, tmp_path: Path) -> None:
        for split, count in (("train", 6), ("test", 2)):
            for name in ("cat", "dog"):
                (tmp_path / split / name).mkdir(parents=True)
                for number in range(count):
                    data = user_corpora.jpg(number)
                    (tmp_path / split / name / f"{number}.jpg").write_bytes(data)
        (tmp_path / "train" / "loose.jpg").write_bytes(user_corpora.jpg(1))
        corpus = open_external_corpus("animals", f"folder:{tmp_path}", {"validation": 0.0})
        corpus.scan_labels()
        assert corpus.task == "image_classification"
        assert corpus.facts() == {"labels": ["cat", "dog"]}
        rows, reasons = read(corpus)
        assert sizes(rows) == {"test": 4, "train": 12}
        assert reasons == {"not in a folder that names a class": 1}

    def test_one_file_of_texts(self, tmp_path: Path) -> None:
        lines = [f'{n},{"好" if n % 2 else "坏"},"第{n}\n\u2028条, 新闻"' for n in range(20)]
        (tmp_path / "rows.csv").write_text("id,label,text\n" + "\n".join(lines) + "\nx\n", "utf-8")
        corpus = open_external_corpus("mine", f"folder:{tmp_path / 'rows.csv'}")
        assert corpus.task == "text_classification"
        rows, reasons = read(corpus)
        assert reasons == {"a different number of fields than the header": 1}
        assert rows["train"][0]["text"].endswith("条, 新闻")

    def test_functions_with_a_split_field(self, tmp_path: Path) -> None:
        lines = user_corpora.code_rows(9)
        for number, line in enumerate(lines):
            line["part"] = ("train", "dev", "test")[number % 3]
        lines.append(lines[0] | {"part": "nowhere"})
        user_corpora.write_lines(tmp_path / "functions.jsonl", lines)
        options = {"split": "part", "text": "docstring"}
        corpus = open_external_corpus("mine", f"folder:{tmp_path / 'functions.jsonl'}", options)
        assert corpus.task == "text_to_code"
        rows, reasons = read(corpus)
        assert sizes(rows) == {"test": 3, "train": 3, "validation": 3}
        assert reasons == {"a split that is not train, validation or test": 1}

    def test_paths_that_lead_out_are_rejected(self, tmp_path: Path) -> None:
        folder = user_corpora.media_folder(tmp_path / "in", rows=3)
        names = ["/etc/passwd", "../../x.wav", "data/../../x.wav", "file:///etc/passwd", "a\0b", ""]
        with (folder / "metadata.jsonl").open("a") as out:
            for name in names:
                out.write(f'{{"file_name": {__import__("json").dumps(name)}}}\n')
        _, reasons = read(open_external_corpus("folder", str(folder)))
        assert reasons == {
            "a path that leads out of the folder": 4,
            "a path with a null character": 1,
            "no file name": 1,
        }

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"text": "nothing"}, r"options\.folder\.text: no field 'nothing'; rows have"),
            ({"split_by": "speeker"}, r"split_by: no field 'speeker'; did you mean 'speaker'\?"),
            ({"split": "part"}, r"options\.folder\.split: no field 'part'; rows have"),
            ({"task": "labels"}, r"options\.folder\.task: rows have no labels"),
            ({"modality": "imagee"}, "modality: unknown modality 'imagee'; did you mean 'image'"),
        ],
    )
    def test_missing_fields_are_reported(self, tmp_path: Path, options: dict, message: str) -> None:
        user_corpora.media_folder(tmp_path)
        with pytest.raises(UserError, match=message):
            open_external_corpus("folder", str(tmp_path), options)

    def test_media_without_annotations_are_no_errors(self, tmp_path: Path) -> None:
        folder = user_corpora.media_folder(tmp_path, rows=3)
        with (folder / "metadata.jsonl").open("a") as out:
            out.write('{"file_name": "data/0.wav", "transcription": " "}\n')
            out.write(
                '{"file_name": "data/1.wav"}\n{"file_name": "data/2.wav", "transcription": 7}'
            )
        found = open_external_corpus("folder", str(folder)).rows(SourceArchives.none())
        rejected = [
            (r.reason, r.row, r.counts_as_error) for r in found if isinstance(r, RejectedRow)
        ]
        assert rejected == [
            ("audio without a transcript", 4, False),
            ("audio without a transcript", 5, False),
            ("a text is missing", 6, True),
        ]

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

    def test_a_store_is_not_queried_for_each_row(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A missing media file is found when it is read, in parallel."""
        folder = user_corpora.media_folder(tmp_path, rows=30)
        store = fsspec.filesystem("memory")
        store.put(str(folder), "/not-asked/mine", recursive=True)
        store.rm("/not-asked/mine/data/3.wav")
        asked, info = [], type(store).info

        def noting(self: object, path: str, **more: object) -> object:
            asked.append(path)
            return info(self, path, **more)

        monkeypatch.setattr(type(store), "info", noting)
        corpus = open_external_corpus("mine", "folder:memory://not-asked/mine")
        corpus.scan_labels()
        rows, _ = read(corpus)
        # The first file shows in which folder the media lie.
        assert [path for path in asked if path.endswith(".wav")] == ["/not-asked/mine/data/0.wav"]
        monkeypatch.undo()
        every = [row["media"] for each in rows.values() for row in each]
        missing = [data for data in read_media(every) if isinstance(data, MediaReadError)]
        assert [data.reason for data in missing] == ["the media file is missing"]

    def test_a_tar_beside_metadata_is_not_detected(self, tmp_path: Path) -> None:
        folder = user_corpora.media_folder(tmp_path, rows=3)
        (folder / "backup.tar.gz").write_bytes(
            tarred({"0.wav": user_corpora.wav(0), "0.txt": b"x"})
        )
        found = detect_reader(SourceDirectory(str(folder)))
        assert found is not None
        assert found[0] == "folder"
        # A description beside tars is not metadata of media.
        tars = user_corpora.webdataset(tmp_path / "tars")
        (tars / "metadata.json").write_text('{"description": "pictures", "samples": 36}')
        found = detect_reader(SourceDirectory(str(tars)))
        assert found is not None
        assert found[0] == "webdataset"


class TestWebDataset:
    def test_the_first_image_can_lack_a_caption(self, tmp_path: Path) -> None:
        files = {"0.jpg": user_corpora.jpg(0)}
        for n in (1, 2):
            files |= {f"{n}.jpg": user_corpora.jpg(n), f"{n}.txt": b"words"}
        (tmp_path / "x.tar").write_bytes(gzip.decompress(tarred(files)))
        corpus = open_external_corpus("webdataset", str(tmp_path))
        assert corpus.task == "text_to_image"
        (bare,) = [
            row for row in corpus.rows(SourceArchives.none()) if isinstance(row, RejectedRow)
        ]
        assert (bare.reason, bare.row, bare.counts_as_error) == (
            "an image without captions",
            1,
            False,
        )

    def test_members_are_byte_ranges_of_their_tar(self, tmp_path: Path) -> None:
        corpus = open_external_corpus("webdataset", str(user_corpora.webdataset(tmp_path)))
        assert corpus.task == "text_to_image"
        rows, reasons = read(corpus)
        assert not reasons
        assert len(rows["test"]) == 12
        assert len(rows["train"]) + len(rows.get("validation", [])) == 24
        assert all(media(row)[:2] == b"\xff\xd8" for row in rows["test"])
        assert all(row["media"]["length"] for row in rows["train"])
        assert [(row["file"], row["row"]) for row in rows["test"]] == [
            ("test-000000.tar", number) for number in range(1, 13)
        ]
        assert corpus.facts() == {"queries": "all"}

    def test_compressed_tars_and_json(self, tmp_path: Path) -> None:
        files = {}
        for n in range(10):
            files[f"a/{n}.wav"] = user_corpora.wav(n)
            files[f"a/{n}.json"] = f'{{"transcription": "第{n}句"}}'.encode()
        files["a/3.json"] = b'{"transcription": '
        (tmp_path / "x.tar.gz").write_bytes(tarred(files))
        corpus = open_external_corpus("webdataset", str(tmp_path / "x.tar.gz"))
        assert corpus.task == "speech_recognition"
        rows, reasons = read(corpus)
        assert reasons == {"not JSON": 1}
        assert all(media(row)[:4] == b"RIFF" for each in rows.values() for row in each)

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


@pytest.mark.parametrize(("named", "stored"), [("NFC", "NFD"), ("NFD", "NFC"), ("NFC", "NFC")])
def test_names_match_in_any_unicode_form(tmp_path: Path, named: str, stored: str) -> None:
    """macOS and most editors write letters with accents in different forms."""
    names = [f"photos/épée {number} 각.jpg" for number in range(3)]
    (tmp_path / "photos").mkdir()
    for name in names:
        (tmp_path / unicodedata.normalize(stored, name)).write_bytes(b"not looked at")
    rows = [
        {"file_name": unicodedata.normalize(named, name), "label": "ab"[number % 2]}
        for number, name in enumerate(names)
    ]
    user_corpora.write_lines(tmp_path / "metadata.jsonl", rows)
    found, reasons = read(open_external_corpus("mine", f"folder:{tmp_path}"))
    assert not reasons
    assert sum(map(len, found.values())) == 3
