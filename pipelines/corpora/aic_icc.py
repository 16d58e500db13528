"""AIC-ICC: photographs with five Chinese captions each (AI Challenger 2017).

    ai_challenger_caption_train_20170902/caption_train_annotations_20170902.json
    ai_challenger_caption_train_20170902/caption_train_images_20170902/<hex>.jpg
    … validation_20170910, test_a_20180103, test_b_20180103 alike

One JSON array of ``{"url", "image_id": "<hex>.jpg", "caption": [five]}`` each. ``test_a`` is the
split ``test`` and ``test_b`` is ``test_b``; without them the validation pictures are parted in
halves, one of them the test.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipelines.corpora.base import Rejected, Row, Sources
from pipelines.corpora.finish import CaptionOptions, ImageOptions
from pipelines.corpora.placed import (
    MediaOptions,
    PlacedCorpus,
    bad,
    clean_captions,
    half,
    key_of,
    media_row,
)
from pipelines.corpora.records import Broken, entries
from pipelines.media import MediaRef
from pipelines.places import Place
from skillnet_platform.errors import UserError

ANNOTATIONS = re.compile(r"caption_(train|validation|test_?a|test_?b|test)_annotations_\w+\.json$")
SPLITS = {"train": "train", "validation": "validation", "testa": "test", "testb": "test_b"}


@dataclass
class AicOptions(CaptionOptions, ImageOptions, MediaOptions):
    """AIC-ICC: the options of pictures and captions."""


class AicIcc(PlacedCorpus):
    """Photographs, each with all of its captions."""

    name = "aic_icc"
    modality = "image"
    Options = AicOptions
    has = ("captions",)

    @classmethod
    def guess(cls, place: Place) -> str | None:
        """A file of annotations."""
        found = list(_annotations(place))
        return f"{found[0][1]} is an annotation file of AIC-ICC" if found else None

    def locate(self) -> None:
        """Find the files of annotations."""
        self.files = list(_annotations(self.place))
        if not self.files:
            raise UserError(
                f"{self.place.uri}: no caption_train_annotations_….json in it or up to three "
                "folders below; AIC-ICC has one in each of its folders"
            )
        self.home = Place(self.options.media) if self.options.media else self.place
        self.halved = not any(split.startswith("test") for split, _ in self.files)

    def facts(self) -> dict[str, Any]:
        """Captions are alike: each is a query when the model is evaluated."""
        return super().facts() | {"queries": "all"}

    def annotations(self) -> list[str]:
        """The files of annotations."""
        return [file for _, file in self.files]

    def rows(self, sources: Sources) -> Iterator[Row | Rejected]:
        """Pictures in the order of the annotations, then those without captions."""
        for split, file in self.files:
            folder, there = self._pictures(file)
            told: set[str] = set()
            for number, _, record in entries(self.place, file):
                key = key_of(f"{file}:{number}")
                if isinstance(record, Broken):
                    yield bad(key, record.reason, file, number, record.rest)
                    continue
                try:
                    row = self._row(split, folder, there, told, record)
                except ValueError as problem:
                    yield bad(key, str(problem), file, number)
                    continue
                yield row | {"file": file, "row": number}
            for name in sorted(there - told):
                yield Rejected(
                    key_of(folder, name), "a picture without captions", f"{folder}/{name}"
                )

    def _row(self, split: str, folder: str, there: set[str], told: set[str], record: object) -> Row:
        if not isinstance(record, dict) or not isinstance(record.get("image_id"), str):
            raise ValueError("no image_id")
        name = record["image_id"]
        path = self.home.path(f"{folder}/{name}")
        if "/" in name or "\\" in name:
            raise ValueError("a path that leads out of the folder")
        told.add(name)
        captions = clean_captions(record.get("caption"))
        if name not in there:
            raise ValueError("captions without a picture")
        if split == "validation" and self.halved:
            split = half(name)
        return media_row(split, key_of(folder, name), MediaRef(path), captions)

    def _pictures(self, file: str) -> tuple[str, set[str]]:
        """The folder of a file's pictures, and what is in it."""
        home, _, name = file.rpartition("/")
        images = name.replace("_annotations_", "_images_").removesuffix(".json")
        for folder in (f"{home}/{images}" if home else images, images, home):
            place = "" if self.options.media and folder == home else folder
            if self.home.exists(place):
                names = {e.name for e in self.home.entries(place) if not e.is_folder}
                return place, names - {name}
        return images, set()


def _annotations(place: Place) -> Iterator[tuple[str, str]]:
    """(Split, file) of every file of annotations, in order."""
    if place.is_file:
        return
    for folder in place.folders(depth=3):
        if "_images_" in folder:
            continue
        for entry in place.entries(folder):
            if not entry.is_folder and (found := ANNOTATIONS.search(entry.name)):
                part = found.group(1).replace("_", "")
                file = f"{folder}/{entry.name}" if folder else entry.name
                yield SPLITS.get(part, "test"), file
