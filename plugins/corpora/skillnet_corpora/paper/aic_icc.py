"""AIC-ICC: photographs with five Chinese captions each (AI Challenger 2017).

    ai_challenger_caption_train_20170902/caption_train_annotations_20170902.json
    ai_challenger_caption_train_20170902/caption_train_images_20170902/<hex>.jpg
    … validation_20170910, test_a_20180103, test_b_20180103 in the same layout

An annotation file is a JSON array of ``{"url", "image_id": "<hex>.jpg", "caption": [five]}``.
Images can also lie beside the annotations, or all in one folder. Unpacking can put the image folder
into a second folder of the same name. File endings can be in capitals.

``test_a`` becomes the split ``test``, and ``test_b`` stays ``test_b``. If they are missing or have
no captions, half of the validation images become the test.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

from pipelines.data.corpora.base import RejectedRow, Row, SourceArchives
from pipelines.data.corpora.formats.packed_archives import missing_format_error
from pipelines.data.corpora.formats.record_reader import BadRecord, read_json_entries
from pipelines.data.corpora.readers.base import CaptionOptions, MediaOptions
from pipelines.data.corpora.readers.captions import CaptionedCorpus
from pipelines.data.corpora.readers.fields import file_extension
from pipelines.data.corpora.readers.row_builders import (
    clean_captions,
    error_row,
    make_key,
    media_row,
)
from pipelines.data.io.directory import SourceDirectory
from pipelines.data.io.media import MediaRef
from pipelines.data.modalities.image import ImageOptions
from skillnet.modality import find_modality

ANNOTATIONS = re.compile(r"caption_(train|validation|test_?a|test_?b|test)_annotations_\w+\.json$")
#: Images of a test that are checked for captions.
SAMPLE_IMAGES = 100
SPLITS = {"train": "train", "validation": "validation", "testa": "test", "testb": "test_b"}


@dataclass
class AicOptions(CaptionOptions, ImageOptions, MediaOptions):
    """AIC-ICC: the options of images and captions."""


class AicIccCorpus(CaptionedCorpus):
    """Photographs with all of their captions."""

    name = "aic_icc"
    modality = "image"
    Options = AicOptions
    version = 2  # endings in capitals, folders that are unpacked deeper, tests without captions

    @classmethod
    def detect(cls, source: SourceDirectory) -> str | None:
        """Return the name of an annotation file as evidence."""
        found = list(_annotation_files(source))
        return f"{found[0][1]} is an annotation file of AIC-ICC" if found else None

    def discover(self) -> None:
        """Find the annotation files."""
        files = list(_annotation_files(self.source))
        if not files:
            raise missing_format_error(
                self.source,
                "no caption_train_annotations_….json in it or up to three folders below; AIC-ICC "
                "has one in each of its folders",
            )
        tests = [file for split, file in files if split.startswith("test")]
        #: Annotation files of tests without captions.
        self.uncaptioned_tests = [file for file in tests if not self._has_captions(file)]
        self.set_annotation_files([each for each in files if each[1] not in self.uncaptioned_tests])

    def annotation_files(self) -> list[str]:
        """Return all annotation files, including those of tests without captions."""
        return super().annotation_files() + self.uncaptioned_tests

    def rows(self, sources: SourceArchives) -> Iterator[Row | RejectedRow]:
        """Yield images in the order of the annotations, then those without captions."""
        images: dict[str, ImageIndex] = {}  # by folder, because splits can share one
        named: dict[str, set[str]] = defaultdict(set)
        for split, file in self.files:
            folder = self._image_folder(file)
            if folder not in images:
                images[folder] = self._index_images(folder)
            build = partial(self._build_row, split, folder, images[folder], named[folder])
            yield from self.annotated_rows(file, build)
        yield from self._uncaptioned_rows(named)
        for folder, index in images.items():
            for name in sorted(index.names - named[folder]):
                path = _join(folder, name)
                yield RejectedRow(make_key(path), "an image without captions", path)

    def _uncaptioned_rows(self, named: dict[str, set[str]]) -> Iterator[RejectedRow]:
        for file in self.uncaptioned_tests:
            folder = self._image_folder(file)
            for number, _, record in read_json_entries(self.source, file):
                key = make_key(f"{file}:{number}")
                if isinstance(record, BadRecord):
                    yield error_row(key, record.reason, file, number, record.truncates_file)
                    continue
                name = record.get("image_id") if isinstance(record, dict) else None
                named[folder].add(str(name))
                yield RejectedRow(key, "a test image without captions", file, number)

    def _has_captions(self, file: str) -> bool:
        first = islice(read_json_entries(self.source, file), SAMPLE_IMAGES)
        return any(isinstance(record, dict) and record.get("caption") for _, _, record in first)

    def _build_row(
        self,
        split: str,
        folder: str,
        images: "ImageIndex",
        named: set[str],
        key: str | None,
        record: object,
    ) -> Row:
        if not isinstance(record, dict) or not isinstance(record.get("image_id"), str):
            raise ValueError("no image_id")
        name = record["image_id"]
        # The annotations are not trusted: a name must not select a file outside of its folder.
        if "/" in name or "\\" in name:
            raise ValueError("a path that leads out of the folder")
        found = images.find(name)
        inside = _join(folder, found or name)
        path = self.media_source.path(inside)
        # Recorded before the captions are checked, so that the image is not reported twice.
        named.add(found or name)
        captions = clean_captions(record.get("caption"))
        if found is None:
            raise ValueError("captions without an image")
        split = self.assign_split(split, name)
        return media_row(split, make_key(inside), MediaRef(path), captions)

    def _image_folder(self, file: str) -> str:
        """Return the folder of an annotation file's images, "" for the media directory itself."""
        parent, _, name = file.rpartition("/")
        images = name.replace("_annotations_", "_images_").removesuffix(".json")
        fallback = "" if self.options.media else parent
        nested = f"{images}/{images}"
        candidates = (_join(parent, nested), _join(parent, images), nested, images)
        return next((f for f in candidates if self.media_source.exists(f)), fallback)

    def _index_images(self, folder: str) -> "ImageIndex":
        return ImageIndex(
            entry.name
            for entry in self.media_source.entries(folder)
            if not entry.is_folder
            and file_extension(entry.name) in find_modality("image").extensions
        )


class ImageIndex:
    """Names of image files that are found with endings in small letters or capitals."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = set(names)
        changed = (n for n in sorted(self.names) if _lower_extension(n) != n)
        self._by_lower = {_lower_extension(n): n for n in changed}

    def find(self, name: str) -> str | None:
        """Return the name of the file that is meant, or None."""
        if name in self.names:
            return name
        lower = _lower_extension(name)
        return lower if lower in self.names else self._by_lower.get(lower)


def _lower_extension(name: str) -> str:
    """``"A.JPG" -> "A.jpg"``."""
    stem, dot, extension = name.rpartition(".")
    return f"{stem}{dot}{extension.lower()}"


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _annotation_files(source: SourceDirectory) -> Iterator[tuple[str, str]]:
    """Yield (split, file) of every annotation file, in order."""
    if source.is_file:
        return
    for folder in source.folders(depth=3):
        if "_images_" in folder:
            continue  # folders of many images take long to list
        for entry in source.entries(folder):
            if not entry.is_folder and (found := ANNOTATIONS.search(entry.name)):
                part = found.group(1).replace("_", "")
                yield SPLITS.get(part, "test"), _join(folder, entry.name)
