"""AIC-ICC: photographs with five Chinese captions each (AI Challenger 2017).

    ai_challenger_caption_train_20170902/caption_train_annotations_20170902.json
    ai_challenger_caption_train_20170902/caption_train_images_20170902/<hex>.jpg
    … validation_20170910, test_a_20180103, test_b_20180103 alike

One JSON array of ``{"url", "image_id": "<hex>.jpg", "caption": [five]}`` each; pictures may lie
beside the annotations, too, or all in one folder. ``test_a`` is the split ``test`` and ``test_b``
is ``test_b``; without them the validation pictures are parted in halves, one of them the test.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from pipelines.corpora.base import Rejected, Row, Sources
from pipelines.corpora.captioned import CaptionedCorpus
from pipelines.corpora.fielded import ENDINGS, ending_of
from pipelines.corpora.finish import CaptionOptions, ImageOptions
from pipelines.corpora.placed import (
    MediaOptions,
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


class AicIcc(CaptionedCorpus):
    """Photographs, each with all of its captions."""

    name = "aic_icc"
    modality = "image"
    Options = AicOptions

    @classmethod
    def guess(cls, place: Place) -> str | None:
        """A file of annotations."""
        found = list(_annotations(place))
        return f"{found[0][1]} is an annotation file of AIC-ICC" if found else None

    def locate(self) -> None:
        """Find the files of annotations."""
        files = list(_annotations(self.place))
        if not files:
            raise UserError(
                f"{self.place.uri}: no caption_train_annotations_….json in it or up to three "
                "folders below; AIC-ICC has one in each of its folders"
            )
        self.take(files)

    def rows(self, sources: Sources) -> Iterator[Row | Rejected]:
        """Pictures in the order of the annotations, then those without captions."""
        pictures: dict[str, set[str]] = {}  # of each folder: splits may share one
        told: dict[str, set[str]] = defaultdict(set)
        for split, file in self.files:
            folder = self._folder(file)
            if folder not in pictures:
                pictures[folder] = self._pictures(folder)
            for number, _, record in entries(self.place, file):
                key = key_of(f"{file}:{number}")
                if isinstance(record, Broken):
                    yield bad(key, record.reason, file, number, record.rest)
                    continue
                try:
                    row = self._row(split, folder, pictures[folder], told[folder], record)
                except ValueError as problem:
                    yield bad(key, str(problem), file, number)
                    continue
                yield row | {"file": file, "row": number}
        for folder, there in pictures.items():
            for name in sorted(there - told[folder]):
                path = _below(folder, name)
                yield Rejected(key_of(path), "a picture without captions", path)

    def _row(self, split: str, folder: str, there: set[str], told: set[str], record: object) -> Row:
        if not isinstance(record, dict) or not isinstance(record.get("image_id"), str):
            raise ValueError("no image_id")
        name = record["image_id"]
        if "/" in name or "\\" in name:
            raise ValueError("a path that leads out of the folder")
        inside = _below(folder, name)
        path = self.home.path(inside)
        told.add(name)
        captions = clean_captions(record.get("caption"))
        if name not in there:
            raise ValueError("captions without a picture")
        if split == "validation" and self.halved:
            split = half(name)
        return media_row(split, key_of(inside), MediaRef(path), captions)

    def _folder(self, file: str) -> str:
        """The folder of a file's pictures, "" for the place itself."""
        home, _, name = file.rpartition("/")
        images = name.replace("_annotations_", "_images_").removesuffix(".json")
        last = "" if self.options.media else home
        return next((f for f in (_below(home, images), images) if self.home.exists(f)), last)

    def _pictures(self, folder: str) -> set[str]:
        """Names of the pictures in a folder."""
        return {
            entry.name
            for entry in self.home.entries(folder)
            if not entry.is_folder and ending_of(entry.name) in ENDINGS["image"]
        }


def _below(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


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
