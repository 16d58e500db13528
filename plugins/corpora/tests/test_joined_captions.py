"""One row per caption: the rows of one media file are one item, in one split."""

import csv
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest

from pipelines.data.corpora import ExternalCorpus, open_external_corpus
from pipelines.data.corpora.base import JOINED_ROW, MAX_TEXT_LENGTH
from pipelines.data.corpora.readers.row_builders import MAX_CAPTIONS
from pipelines.data.preprocessing.inspection import inspect_corpus, show_inspection
from pipelines.prepare import show_corpora
from skillnet_corpora.readers import joined_captions
from tests.helpers import user_corpora
from tests.helpers.corpus_rows import media, read
from tests.helpers.hub_repositories import embed, write_repository

IMAGES, CAPTIONS = 40, 5


def caption_rows(shuffled: bool) -> list[tuple[int, str]]:
    """Return (number of the image, caption), five per image, as in Flickr8k."""
    rows = [(n, f"图{n}的第{c}句") for n in range(IMAGES) for c in range(CAPTIONS)]
    if shuffled:
        random.Random(0).shuffle(rows)  # noqa: S311
    return rows


def picture(number: int) -> bytes:
    return user_corpora.jpg(number, (40 + number, 40))


def write_csv(folder: Path, rows: list[tuple[int, str]]) -> str:
    """Write captions in a CSV file beside the images, as in Flickr8k."""
    for number in range(IMAGES):
        (folder / f"{number}.jpg").write_bytes(picture(number))
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as stream:
        lines = [("image", "caption"), *((f"{n}.jpg", text) for n, text in rows)]
        csv.writer(stream).writerows(lines)
    return f"folder:{folder}"


def write_hub(folder: Path, rows: list[tuple[int, str]]) -> str:
    """Write captions with embedded images, as on the Hub; equal images have several paths."""
    found = [
        {"image": embed(picture(n), f"{k}.jpg"), "caption": text}
        for k, (n, text) in enumerate(rows)
    ]
    columns = {"image": "Image", "caption": pa.string()}
    return f"folder:{write_repository(folder, columns, {'train': found}, shards=2)}"


def write_saved(folder: Path, rows: list[tuple[int, str]]) -> str:
    """Write captions with embedded images by ``save_to_disk``."""
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    columns = {"image": [embed(picture(n)) for n, _ in rows], "caption": [text for _, text in rows]}
    datasets.Dataset.from_dict(columns, features).save_to_disk(str(folder / "saved"))
    return f"hf_dataset:{folder / 'saved'}"


WRITERS = {"csv": write_csv, "hub": write_hub, "saved": write_saved}


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("kind", WRITERS)
def test_rows_of_one_image_are_one_item(tmp_path: Path, kind: str, shuffled: bool) -> None:
    written = caption_rows(shuffled)
    place = WRITERS[kind](tmp_path, written)
    corpus = open_external_corpus("mine", place, {"test": 0.3, "validation": 0.2})
    assert corpus.task == "text_to_image"
    rows, reasons = read(corpus)
    assert reasons == {JOINED_ROW: IMAGES * (CAPTIONS - 1)}
    items = [row for each in rows.values() for row in each]
    assert len(items) == IMAGES
    assert set(rows) == {"train", "validation", "test"}
    expected: dict[bytes, list[str]] = {}
    for number, text in written:
        expected.setdefault(picture(number), []).append(text)
    assert {media(row): row["captions"] for row in items} == expected
    assert not any("item" in row for row in items)
    # A preview starts before all rows are known. Its counts are exact, too.
    corpus.is_preview = True
    preview, preview_reasons = read(corpus)
    assert (sum(map(len, preview.values())), preview_reasons) == (IMAGES, reasons)


@pytest.mark.parametrize("shuffled", [False, True])
def test_inspect_shows_items(tmp_path, shuffled, capsys):
    report = inspect_corpus(write_csv(tmp_path, caption_rows(shuffled)))
    assert sum(report["splits"].values()) == IMAGES
    assert report["captions"]["per_row"] == "5"
    assert "item" not in report["example"]
    # Joined rows are no loss, so they are not among the rejected ones.
    joined = IMAGES * (CAPTIONS - 1)
    assert (report["rows"], report["joined"], report["rejected"]) == (200, joined, {})
    show_inspection(report)
    shown = capsys.readouterr().out
    assert f"{IMAGES}: {joined} rows are further captions of an item" in shown
    assert "would reject" not in shown
    size = len(picture(0))
    assert f"{tmp_path}/0.jpg ({size:,} bytes, JPEG)" in " ".join(shown.split()) or shuffled


def write_lines(folder: Path, rows: list[dict[str, Any]]) -> ExternalCorpus:
    for row in rows:
        (folder / row["file_name"]).write_bytes(b"picture")
    text = "\n".join(json.dumps(row) for row in rows) + "\n"
    (folder / "metadata.jsonl").write_text(text, "utf-8")
    return open_external_corpus("mine", f"folder:{folder}", {"modality": "image"})


def test_splits_that_the_corpus_gives_stay_separate(tmp_path: Path) -> None:
    """An item of the test must not get captions of the training rows."""
    rows = [
        {"file_name": "a.jpg", "caption": f"{split} {n}", "split": split}
        for n in range(3)
        for split in ("train", "test")
    ]
    found, reasons = read(write_lines(tmp_path, rows))
    assert reasons == {JOINED_ROW: 4}
    assert [row["captions"] for row in found["test"]] == [["test 0", "test 1", "test 2"]]
    assert [row["captions"] for row in found["train"]] == [["train 0", "train 1", "train 2"]]


def test_rejected_rows_are_counted_once(tmp_path: Path) -> None:
    captions = ["one", "", "two", "one", "three"]
    rows = [{"file_name": "a.jpg", "caption": caption} for caption in captions]
    found, reasons = read(write_lines(tmp_path, rows))
    (item,) = [row for each in found.values() for row in each]
    assert item["captions"] == ["one", "two", "three"]
    assert reasons == {"an image without captions": 1, JOINED_ROW: 3}


def test_an_image_with_too_many_captions_is_rejected(tmp_path, monkeypatch):
    """A picture "not available" can stand for thousands of images."""
    monkeypatch.setattr(joined_captions, "MAX_RUN_ROWS", 7)
    count = MAX_CAPTIONS + 1
    rows = [{"file_name": "a.jpg", "caption": str(n)} for n in range(count)]
    rows.append({"file_name": "b.jpg", "caption": "b"})
    found, reasons = read(write_lines(tmp_path, rows))
    assert Counter(row["captions"][0] for each in found.values() for row in each) == {"b": 1}
    assert reasons == {f"more than {MAX_CAPTIONS} captions": 1, JOINED_ROW: count - 1}


def test_a_caption_that_is_too_long_costs_its_own_row_only(tmp_path: Path) -> None:
    long = "长" * (MAX_TEXT_LENGTH + 1)
    rows = [{"file_name": "a.jpg", "caption": text} for text in ("one", long, "two", long)]
    found, reasons = read(write_lines(tmp_path, rows))
    (item,) = [row for each in found.values() for row in each]
    assert item["captions"] == ["one", "two"]
    assert reasons == {JOINED_ROW: 1, f"captions is longer than {MAX_TEXT_LENGTH} characters": 2}


def test_joined_rows_are_shown_apart_from_rejected_ones(capsys):
    entry = {"state": "prepared", "rows_in": 200, "rows_out": 39, "splits": {"train": 39}}
    entry |= {"quarantine": {JOINED_ROW: 160, "an empty file": 1}, "bytes": 1}
    show_corpora({"corpora": {"mine": entry}, "seconds": 1.0})
    printed = capsys.readouterr()
    assert "1, 160 joined" in printed.out
    said = "mine: rejected rows: 1 an empty file. mine/quarantine.jsonl names them\n"
    assert printed.err == said
    show_corpora({"corpora": {"mine": entry | {"state": "cached"}}, "seconds": 1.0})
    assert not capsys.readouterr().err
