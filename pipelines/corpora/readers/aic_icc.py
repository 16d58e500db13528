"""AIC-ICC: photographs with five Chinese captions each (AI Challenger 2017).

    ai_challenger_caption_train_20170902/caption_train_annotations_20170902.json
    ai_challenger_caption_train_20170902/caption_train_images_20170902/<hex>.jpg
    … validation_20170910, test_a_20180103, test_b_20180103 alike

One JSON array of ``{"url", "image_id": "<hex>.jpg", "caption": [five]}`` each; pictures may lie
beside the annotations, too, or all in one folder; the folder of pictures may stand in one of its
name, as unpacking makes it, and endings be in capitals. ``test_a`` is the split ``test`` and
``test_b`` is ``test_b``; without them, or where they have no captions, the validation pictures are
parted in halves, one of them the test.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from pipelines.corpora.base import RejectedRow, Row, SourceArchives
from pipelines.corpora.formats.packed import missing_format_error
from pipelines.corpora.formats.record_reader import BadRecord, read_json_entries
from pipelines.corpora.readers.base import (
    CaptionedCorpus,
    MediaOptions,
    clean_captions,
    error_row,
    make_key,
    media_row,
    val_or_test,
)
from pipelines.corpora.readers.columns import CaptionOptions, ImageOptions
from pipelines.corpora.readers.fields import MEDIA_EXTENSIONS, file_extension
from pipelines.io.directory import SourceDirectory
from pipelines.io.media import MediaRef

ANNOTATIONS = re.compile(r"caption_(train|validation|test_?a|test_?b|test)_annotations_\w+\.json$")
#: So many pictures of a test are looked at for captions.
SAMPLE_IMAGES = 100
SPLITS = {"train": "train", "validation": "validation", "testa": "test", "testb": "test_b"}


@dataclass
class AicOptions(CaptionOptions, ImageOptions, MediaOptions):
    """AIC-ICC: the options of pictures and captions."""


class AicIccCorpus(CaptionedCorpus):
    """Photographs, each with all of its captions."""

    name = "aic_icc"
    modality = "image"
    Options = AicOptions
    version = 2  # endings in capitals, folders unpacked deeper, tests without captions

    @classmethod
    def detect(cls, place: SourceDirectory) -> str | None:
        """A file of annotations."""
        found = list(_annotations(place))
        return f"{found[0][1]} is an annotation file of AIC-ICC" if found else None

    def discover(self) -> None:
        """Find the files of annotations."""
        files = list(_annotations(self.source))
        if not files:
            raise missing_format_error(
                self.source,
                "no caption_train_annotations_….json in it or up to three folders below; AIC-ICC "
                "has one in each of its folders",
            )
        tests = [file for split, file in files if split.startswith("test")]
        #: Files of tests that have no captions.
        self.bare_tests = [file for file in tests if not self._captioned(file)]
        self.set_annotation_files([each for each in files if each[1] not in self.bare_tests])

    def annotation_files(self) -> list[str]:
        """The files of annotations, those of tests without captions too."""
        return super().annotation_files() + self.bare_tests

    def rows(self, sources: SourceArchives) -> Iterator[Row | RejectedRow]:
        """Pictures in the order of the annotations, then those without captions."""
        pictures: dict[str, ImageIndex] = {}  # of each folder: splits may share one
        told: dict[str, set[str]] = defaultdict(set)
        for split, file in self.files:
            folder = self._folder(file)
            if folder not in pictures:
                pictures[folder] = self._pictures(folder)
            for number, _, record in read_json_entries(self.source, file):
                key = make_key(f"{file}:{number}")
                if isinstance(record, BadRecord):
                    yield error_row(key, record.reason, file, number, record.truncates_file)
                    continue
                try:
                    row = self._row(split, folder, pictures[folder], told[folder], record)
                except ValueError as problem:
                    yield error_row(key, str(problem), file, number)
                    continue
                yield row | {"file": file, "row": number}
        yield from self._bare_tests(told)
        for folder, there in pictures.items():
            for name in sorted(there.names - told[folder]):
                path = _below(folder, name)
                yield RejectedRow(make_key(path), "a picture without captions", path)

    def _bare_tests(self, told: dict[str, set[str]]) -> Iterator[RejectedRow]:
        for file in self.bare_tests:
            folder = self._folder(file)
            for number, _, record in read_json_entries(self.source, file):
                key = make_key(f"{file}:{number}")
                if isinstance(record, BadRecord):
                    yield error_row(key, record.reason, file, number, record.truncates_file)
                    continue
                name = record.get("image_id") if isinstance(record, dict) else None
                told[folder].add(str(name))
                yield RejectedRow(key, "a picture of a test without captions", file, number)

    def _captioned(self, file: str) -> bool:
        first = islice(read_json_entries(self.source, file), SAMPLE_IMAGES)
        return any(isinstance(record, dict) and record.get("caption") for _, _, record in first)

    def _row(
        self, split: str, folder: str, there: "ImageIndex", told: set[str], record: object
    ) -> Row:
        if not isinstance(record, dict) or not isinstance(record.get("image_id"), str):
            raise ValueError("no image_id")
        name = record["image_id"]
        if "/" in name or "\\" in name:
            raise ValueError("a path that leads out of the folder")
        found = there.find(name)
        inside = _below(folder, found or name)
        path = self.media_source.path(inside)
        told.add(found or name)
        captions = clean_captions(record.get("caption"))
        if found is None:
            raise ValueError("captions without a picture")
        if split == "validation" and self.lacks_test:
            split = val_or_test(name)
        return media_row(split, make_key(inside), MediaRef(path), captions)

    def _folder(self, file: str) -> str:
        """The folder of a file's pictures, "" for the place itself."""
        home, _, name = file.rpartition("/")
        images = name.replace("_annotations_", "_images_").removesuffix(".json")
        last = "" if self.options.media else home
        deeper = f"{images}/{images}"
        looked_for = (_below(home, deeper), _below(home, images), deeper, images)
        return next((f for f in looked_for if self.media_source.exists(f)), last)

    def _pictures(self, folder: str) -> "ImageIndex":
        """Those in a folder."""
        return ImageIndex(
            entry.name
            for entry in self.media_source.entries(folder)
            if not entry.is_folder and file_extension(entry.name) in MEDIA_EXTENSIONS["image"]
        )


class ImageIndex:
    """Names of pictures, found whether or not their endings are in capitals."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = set(names)
        self._others = {_lower(n): n for n in sorted(self.names) if _lower(n) != n}

    def find(self, name: str) -> str | None:
        """The picture that is meant, as its file is named."""
        if name in self.names:
            return name
        lower = _lower(name)
        return lower if lower in self.names else self._others.get(lower)


def _lower(name: str) -> str:
    """``"A.JPG" -> "A.jpg"``."""
    stem, dot, ending = name.rpartition(".")
    return f"{stem}{dot}{ending.lower()}"


def _below(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _annotations(place: SourceDirectory) -> Iterator[tuple[str, str]]:
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
