"""Corpora of the paper whose annotations are JSON: a table of their files each, over one loop.

    TNEWS           tnews_public/train.json dev.json test.json
    AIC-ICC         ai_challenger_caption_train_20170902/caption_train_annotations_20170902.json
    VATEX           vatex_training_v1.0.json, vatex_validation_v1.0.json, <videoID>.mp4
    PyTorrent       both/{train,valid,test}/*.jsonl.gz
    CodeSearchNet   python/final/jsonl/{train,valid,test}/python_{split}_N.jsonl.gz

A :class:`FileLayout` declares the annotation files of a corpus. :class:`PaperCorpus` finds and
reads them, and a subclass makes a row of one record. The recordings of AISHELL-1, most of them
inside archives, have a module of their own.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, ClassVar, Literal

from pipelines.data.corpora.base import RejectedRow, Row, stable_hash
from pipelines.data.corpora.formats.record_reader import (
    read_json_entries,
    read_json_lines,
    read_records,
)
from pipelines.data.corpora.readers.base import (
    CaptionOptions,
    ExternalCorpus,
    FileRecord,
    MediaOptions,
)
from pipelines.data.corpora.readers.row_builders import (
    UnwantedRowError,
    clean_captions,
    clean_text,
    hash_caption_group,
    make_key,
    media_row,
    val_or_test,
)
from pipelines.data.io.directory import SourceDirectory
from pipelines.data.io.media import MediaRef
from pipelines.data.modalities.code import CodeOptions
from pipelines.data.modalities.image import ImageOptions
from pipelines.data.modalities.text import TextOptions
from pipelines.data.modalities.video import VideoOptions
from pipelines.data.transforms.code import first_paragraph
from pipelines.data.transforms.text import append_keywords
from skillnet.modality import find_modality
from skillnet_corpora.readers.fields import file_extension
from skillnet_corpora.readers.split_lists import join_path
from skillnet_corpora.readers.unread_files import missing_format_error
from skillnet_platform.config.bounds import NonNegativeCount, PartialFraction
from skillnet_platform.errors import UserError

#: First records of a file that are checked for fields and captions.
SAMPLE_RECORDS = 100


@dataclass(frozen=True)
class FileLayout:
    """Annotation files of a corpus.

    Args:
        title: name of the corpus in messages.
        folders: found in the path of a folder that holds them; "" is the path of the corpus.
        files: found in the name of such a file. The group ``split`` of either names its split.
        splits: name of a split in a path -> split.
        missing: what a folder of another format lacks.
        depth: levels of folders below the corpus that are searched.
        is_single: whether a split has one file, the first that is found.
        needs_training: whether the corpus must have training rows, which are then read first.
        read: reads the records of a file with their numbers, and their names in a JSON object.
    """

    title: str
    folders: re.Pattern[str]
    files: re.Pattern[str]
    splits: Mapping[str, str]
    missing: str
    depth: int
    is_single: bool = False
    needs_training: bool = False
    read: Callable[[SourceDirectory, str], Iterable[tuple[Any, ...]]] = read_json_entries

    def find(self, source: SourceDirectory) -> list[tuple[str, str]]:
        """Return (split, file) of the annotation files of a directory."""
        found = list[tuple[str, str]]()
        for folder in [] if source.is_file else source.folders(depth=self.depth):
            above = self.folders.search(folder)
            for entry in source.entries(folder) if above else ():
                named = None if entry.is_folder else self.files.search(entry.name)
                if above and named:
                    part = (above.groupdict() | named.groupdict())["split"]
                    found.append((self.splits[part.lower()], join_path(folder, entry.name)))
        if self.is_single:
            splits = [split for split, _ in found]
            found = [each for n, each in enumerate(found) if splits.index(each[0]) == n]
        order = list(self.splits.values())
        return sorted(found, key=lambda each: order.index(each[0]) if self.needs_training else 0)


class PaperCorpus(ExternalCorpus):
    """A corpus whose annotation files a :class:`FileLayout` declares.

    Attributes:
        files: (split, annotation file) in the order in which they are read.
    """

    layout: ClassVar[FileLayout]
    files: list[tuple[str, str]]

    @classmethod
    def detect(cls, source: SourceDirectory) -> str | None:
        """Return the name of an annotation file as evidence."""
        found = cls.layout.find(source)
        return f"{found[0][1]} is an annotation file of {cls.layout.title}" if found else None

    def discover(self) -> None:
        """Find the annotation files."""
        self.files = self.layout.find(self.source)
        has_training = any(split == "train" for split, _ in self.files)
        if not self.files or (self.layout.needs_training and not has_training):
            raise missing_format_error(self.source, self.layout.missing)

    def annotation_files(self) -> list[str]:
        """Return the annotation files."""
        return [file for _, file in self.files]

    def read_records(self) -> Iterator[FileRecord | RejectedRow]:
        """Yield the records in the order of the annotation files."""
        for split, file in self.files:
            yield from self.read_file(split, file)

    def read_file(self, split: str, file: str) -> Iterator[FileRecord]:
        """Yield the records of an annotation file; ``origin`` is the name in a JSON object."""
        for number, *name, value in self.layout.read(self.source, file):
            yield FileRecord(file, number, value, split, origin=next(iter(name), None))

    @classmethod
    def sample(cls, source: SourceDirectory, file: str, count: int = SAMPLE_RECORDS) -> list[Row]:
        """Return the objects among the first records of a file."""
        values = (value for *_, value in islice(cls.layout.read(source, file), count))
        return [value for value in values if isinstance(value, dict)]


#: Code -> description, from ``labels.json`` of CLUE.
LABELS = {
    "100": "news_story",
    "101": "news_culture",
    "102": "news_entertainment",
    "103": "news_sports",
    "104": "news_finance",
    "106": "news_house",
    "107": "news_car",
    "108": "news_edu",
    "109": "news_tech",
    "110": "news_military",
    "112": "news_travel",
    "113": "news_world",
    "114": "news_stock",
    "115": "news_agriculture",
    "116": "news_game",
}
#: Split -> file of TNEWS.
_TNEWS_PARTS = {"train": "train", "validation": "dev", "test": "test"}


@dataclass
class TnewsOptions(TextOptions):
    """TNEWS.

    Args:
        keywords: append the keywords to the sentence, as some systems do.
        validation: share of ``train`` that is held out for validation if ``dev`` is the test.
    """

    keywords: bool = False
    validation: PartialFraction = 0.05


class TnewsCorpus(PaperCorpus):
    """Headlines of Chinese news in the 15 classes of TNEWS (CLUE).

    A record is ``{"label": "102", "label_desc": …, "sentence": …, "keywords": …}``. The label can
    be a number. The public test has no labels: it becomes the split ``unlabelled``, for ``skillnet
    predict``. Then ``dev`` is the split ``test``, and a share of ``train`` is held out as
    validation. If the test has labels, splits are used as given.
    """

    name = "tnews"
    modality = "text"
    Options = TnewsOptions
    annotations_present = ("labels",)
    version = 2  # keys without the folder
    unlabelled_splits = ("unlabelled",)
    labels = tuple(f"{code} {description}" for code, description in LABELS.items())
    layout = FileLayout(
        "TNEWS",
        folders=re.compile(r"^(tnews(_public)?)?$"),
        files=re.compile(r"^(?P<split>train|dev|test)\.jsonl?(\.gz)?$"),
        splits={part: split for split, part in _TNEWS_PARTS.items()},
        missing="no train.json in it; TNEWS is a folder with train.json, dev.json and test.json",
        depth=1,
        is_single=True,
        needs_training=True,
        read=read_records,
    )

    @classmethod
    def detect(cls, source: SourceDirectory) -> str | None:
        """Return a file with sentences and labels of CLUE as evidence."""
        for _, file in cls.layout.find(source):
            for row in cls.sample(source, file, 1):
                if "sentence" in row and _label_code(row) in LABELS:
                    return f"{file} has sentences with labels of TNEWS"
        return None

    def discover(self) -> None:
        """Find the three files; the test is optional."""
        super().discover()
        tests = [file for split, file in self.files if split == "test"]
        first = [row for file in tests for row in self.sample(self.source, file, 1)]
        self.has_labelled_test = any(_label_code(row) is not None for row in first)

    def read_records(self) -> Iterator[FileRecord]:
        """Yield lines, with keys that depend on neither the folder nor the ending."""
        for split, file in self.files:
            for record in self.read_file(split, file):
                yield record._replace(key=f"{_TNEWS_PARTS[split]}.json:{record.number}")

    def build_record(self, record: FileRecord) -> Row:
        """Return the row of a headline."""
        text = clean_text(record.value.get("sentence"))
        if self.options.keywords:
            text = append_keywords(text, record.value.get("keywords"))
        split, code = self._assign_split(record), _label_code(record.value)
        if split != "unlabelled":
            if code is None:
                raise ValueError("no label")
            if code not in LABELS:
                raise ValueError("a label that TNEWS does not have")
        label = None if split == "unlabelled" else f"{code} {LABELS[code or '']}"
        row: Row = {"split": split, "key": record.key, "group": -1, "text": text}
        return row | {"label": label, "captions": []}

    def _assign_split(self, record: FileRecord) -> str:
        split = str(record.split)
        if self.has_labelled_test:
            return split
        if split == "train":
            is_held_out = stable_hash("tnews", record.key) / 2**64 < self.options.validation
            return "validation" if is_held_out else "train"
        return "test" if split == "validation" else "unlabelled"


def _label_code(record: Row) -> str | None:
    label = record.get("label")
    return None if label is None or label == "" else str(label).strip()


#: Fields that identify a line of CodeSearchNet, and those of PyTorrent alone.
_FUNCTION_FIELDS = {"docstring", "code", "func_name"}
_PYTORRENT_FIELDS = {"code_with_docstrings", "summary"}


@dataclass
class CodePairOptions(CaptionOptions, CodeOptions):
    """Functions and their docstrings.

    Args:
        docstring: field of the docstring, or of its translation.
        code: field of the function.
        language: functions in another language are rejected.
        shortest: minimum length of a docstring's first paragraph in characters.
    """

    docstring: str = "docstring"
    code: str = "code"
    language: str = "python"
    shortest: NonNegativeCount = 4


class CodeSearchNetCorpus(PaperCorpus):
    """Python functions with the first paragraph of their docstrings as query.

    The lines have ``repo, path, func_name, original_string, code, docstring, …``. The function is
    read without its docstring. Splits are used as given: they separate repositories.
    """

    name = "codesearchnet"
    modality = "code"
    Options = CodePairOptions
    annotations_present = ("captions",)
    layout = FileLayout(
        "CodeSearchNet",
        folders=re.compile(r"(^|/)(?P<split>train|valid|validation|test)$"),
        files=re.compile(r"\.jsonl(\.gz)?$"),
        splits={
            **{"train": "train", "valid": "validation", "validation": "validation"},
            "test": "test",
        },
        missing="no folder train with .jsonl.gz files in it or up to four folders below; expected "
        "python/final/jsonl/train/python_train_0.jsonl.gz",
        depth=5,
        needs_training=True,
        read=read_json_lines,
    )

    @classmethod
    def detect(cls, source: SourceDirectory) -> str | None:
        """Return as evidence that lines have its fields, and none of PyTorrent's."""
        fields = cls.first_fields(source)
        if fields >= _FUNCTION_FIELDS and not _PYTORRENT_FIELDS & fields:
            return "train, valid and test hold lines with the fields of CodeSearchNet"
        return None

    @classmethod
    def first_fields(cls, source: SourceDirectory) -> set[str]:
        """Return the fields of the first line in the folders train, valid and test, if any."""
        for _, file in cls.layout.find(source):
            for *_, value in cls.layout.read(source, file):
                return set(value) if isinstance(value, dict) else set()
        return set()

    def discover(self) -> None:
        """Find the files of each split, and check that the first functions have a docstring.

        Raises:
            UserError: they have none; the message lists their fields.
        """
        super().discover()
        file = next(file for split, file in self.files if split == "train")
        names = list(dict.fromkeys(n for row in self.sample(self.source, file) for n in row))
        wanted = self.options.docstring
        if names and wanted not in names:
            likely = next((n for n in names if n.startswith("doc") and "token" not in n), "FIELD")
            raise UserError(
                f"{self.source.path(file)}: no field {wanted!r} with the docstrings; rows have "
                f"{', '.join(names)}. Name it: --options.{self.name}.docstring {likely}"
            )

    def build_record(self, record: FileRecord) -> Row:
        """Return the row of a function."""
        options, fields = self.options, record.value
        if str(fields.get("language") or options.language).lower() != options.language.lower():
            raise UnwantedRowError("of another language")
        # Some copies have the function in ``original_string`` only.
        source = fields.get(options.code) or fields.get("original_string")
        docstring = fields.get(options.docstring)
        if not isinstance(source, str) or not source.strip():
            raise ValueError(f"no field {options.code}")
        if not isinstance(docstring, str):
            raise ValueError(f"no field {options.docstring}")
        caption = first_paragraph(clean_text(docstring)) if docstring.strip() else ""
        if len(caption) < options.shortest:
            raise UnwantedRowError("a docstring that is too short")
        return {
            "split": record.split,
            "key": record.key,
            "group": hash_caption_group([caption]),
            # The splits of the corpus separate repositories.
            "unit": make_key(fields["repo"]) if fields.get("repo") else None,
            # Line ends of Windows are not part of the function.
            "code": clean_text(source.replace("\r\n", "\n")),
            "label": None,
            "captions": [caption],
        }


class PyTorrentCorpus(CodeSearchNetCorpus):
    """Python functions of packages on PyPI, with the fields of CodeSearchNet and further ones.

    For translated docstrings, name the field: ``--options.pytorrent.docstring docstring_zh``.
    """

    name = "pytorrent"
    layout = replace(
        CodeSearchNetCorpus.layout,
        title="PyTorrent",
        missing="no folder train with .jsonl.gz files in it or up to four folders below; expected "
        "both/train/….jsonl.gz",
    )

    @classmethod
    def detect(cls, source: SourceDirectory) -> str | None:
        """Return as evidence that lines have CodeSearchNet's fields and those of PyTorrent."""
        fields = cls.first_fields(source)
        # Without "docstring": a translated docstring can have another name, given as an option.
        if fields >= _FUNCTION_FIELDS - {"docstring"} and _PYTORRENT_FIELDS & fields:
            return "train, valid and test hold lines with the fields of PyTorrent"
        return None

    def discover(self) -> None:
        """Find the files of each split: those in ``both``, if there are other selections."""
        super().discover()
        both = [(split, file) for split, file in self.files if "both/" in file]
        self.files = both or self.files


class CaptionedPaperCorpus(PaperCorpus):
    """Media with several captions each, in JSON annotation files.

    Attributes:
        media_source: the directory of the media.
    """

    annotations_present = ("captions",)
    captions_equivalent = True

    def discover(self) -> None:
        """Find the annotation files and the directory of the media."""
        super().discover()
        media = self.options.media
        self.media_source = SourceDirectory(media) if media else self.source

    def assign_split(self, split: str | None, name: str) -> str:
        """Return the split of a row; without a test, half of the validation rows become the test.

        Args:
            split: split of the annotation file.
            name: value whose rows must stay in one split.
        """
        has_test = any((each or "").startswith("test") for each, _ in self.files)
        return str(split) if has_test or split != "validation" else val_or_test(name)


@dataclass
class AicOptions(CaptionOptions, ImageOptions, MediaOptions):
    """AIC-ICC: the options of images and captions."""


class AicIccCorpus(CaptionedPaperCorpus):
    """AIC-ICC: photographs with five Chinese captions each (AI Challenger 2017).

        ai_challenger_caption_train_20170902/caption_train_annotations_20170902.json
        ai_challenger_caption_train_20170902/caption_train_images_20170902/<hex>.jpg
        … validation_20170910, test_a_20180103, test_b_20180103 in the same layout

    A record is ``{"url", "image_id": "<hex>.jpg", "caption": [five]}``. Images can also lie beside
    the annotations, or all in one folder. Unpacking can put the image folder into a second folder
    of the same name. File endings can be in capitals. If ``test_a`` and ``test_b`` are missing or
    have no captions, half of the validation images become the test.
    """

    name = "aic_icc"
    modality = "image"
    Options = AicOptions
    version = 2  # endings in capitals, folders that are unpacked deeper, tests without captions
    layout = FileLayout(
        "AIC-ICC",
        # Folders of many images take long to list.
        folders=re.compile(r"^(?!.*_images_)"),
        files=re.compile(
            r"caption_(?P<split>train|validation|test_?a|test_?b|test)_annotations_\w+\.json$"
        ),
        splits={
            **{"train": "train", "validation": "validation", "test": "test"},
            **{"test_a": "test", "testa": "test", "test_b": "test_b", "testb": "test_b"},
        },
        missing="no caption_train_annotations_….json in it or up to three folders below; AIC-ICC "
        "has one in each of its folders",
        depth=3,
    )

    def discover(self) -> None:
        """Find the annotation files, and the tests without captions among them."""
        super().discover()
        tests = [file for split, file in self.files if split.startswith("test")]
        #: Annotation files of tests without captions.
        self.uncaptioned_tests = [
            file
            for file in tests
            if not any(row.get("caption") for row in self.sample(self.source, file))
        ]
        self.files = [each for each in self.files if each[1] not in self.uncaptioned_tests]

    def annotation_files(self) -> list[str]:
        """Return all annotation files, including those of tests without captions."""
        return super().annotation_files() + self.uncaptioned_tests

    def read_records(self) -> Iterator[FileRecord | RejectedRow]:
        """Yield images in the order of the annotations, then those without captions."""
        images: dict[str, ImageIndex] = {}  # by folder, because splits can share one
        named: dict[str, set[str]] = defaultdict(set)
        for split, file in self.files:
            folder = self._image_folder(file)
            if folder not in images:
                images[folder] = self._index_images(folder)
            for record in self.read_file(split, file):
                yield record._replace(origin=(folder, images[folder], named[folder]))
        for file in self.uncaptioned_tests:
            folder = self._image_folder(file)
            for record in self.read_file("test", file):
                yield record._replace(origin=(folder, None, named[folder]))
        for folder, index in images.items():
            for name in sorted(index.names - named[folder]):
                path = join_path(folder, name)
                yield RejectedRow(make_key(path), "an image without captions", path)

    def build_record(self, record: FileRecord) -> Row:
        """Return the row of an image."""
        folder, images, named = record.origin
        name = record.value.get("image_id") if isinstance(record.value, dict) else None
        if images is None:
            named.add(str(name))
            raise UnwantedRowError("a test image without captions")
        if not isinstance(name, str):
            raise ValueError("no image_id")
        # The annotations are not trusted: a name must not select a file outside of its folder.
        if "/" in name or "\\" in name:
            raise ValueError("a path that leads out of the folder")
        found = images.find(name)
        inside = join_path(folder, found or name)
        path = self.media_source.path(inside)
        # Recorded before the captions are checked, so that the image is not reported twice.
        named.add(found or name)
        captions = clean_captions(record.value.get("caption"))
        if found is None:
            raise ValueError("captions without an image")
        split = self.assign_split(record.split, name)
        return media_row(split, make_key(inside), MediaRef(path), captions)

    def _image_folder(self, file: str) -> str:
        """Return the folder of an annotation file's images, "" for the media directory itself."""
        parent, _, name = file.rpartition("/")
        images = name.replace("_annotations_", "_images_").removesuffix(".json")
        fallback = "" if self.options.media else parent
        nested = f"{images}/{images}"
        candidates = (join_path(parent, nested), join_path(parent, images), nested, images)
        return next((f for f in candidates if self.media_source.exists(f)), fallback)

    def _index_images(self, folder: str) -> "ImageIndex":
        entries = self.media_source.entries(folder)
        endings = find_modality("image").extensions
        names = (entry.name for entry in entries if not entry.is_folder)
        return ImageIndex(name for name in names if file_extension(name) in endings)


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


_VATEX_FIELDS = {"chinese": ("chCap",), "english": ("enCap",), "both": ("chCap", "enCap")}


@dataclass
class VatexOptions(CaptionOptions, VideoOptions, MediaOptions):
    """VATEX.

    Args:
        captions: "chinese", "english", or "both" with the Chinese captions first.
    """

    captions: Literal["chinese", "english", "both"] = "chinese"


class VatexCorpus(CaptionedPaperCorpus):
    """VATEX: ten-second videos with ten English and ten Chinese captions each.

    A record is ``{"videoID": "<youtube id>_000122_000132", "enCap": […], "chCap": […]}``, or an
    entry of an object with videoIDs as keys. Videos lie anywhere below the directory.

    The public test has no Chinese captions. It is the test only for English captions. For Chinese
    or both, half of the validation videos become the test. Segments of one YouTube video stay
    together.
    """

    name = "vatex"
    modality = "video"
    Options = VatexOptions
    version = 2  # "both" needs a test with captions of both languages
    layout = FileLayout(
        "VATEX",
        folders=re.compile(""),
        # The private test has no captions.
        files=re.compile(
            r"^vatex_(?!.*private).*?(?P<split>train|validation|test).*\.json$", re.IGNORECASE
        ),
        splits={each: each for each in ("train", "validation", "test")},
        missing="no vatex_training_v1.0.json in it or up to three folders below; VATEX consists "
        "of such files and of videos named by videoID",
        depth=3,
        is_single=True,
    )

    def discover(self) -> None:
        """Find the annotation files that have captions of the selected language."""
        super().discover()
        for _, file in sorted(each for each in self.files if each[0] != "test")[:1]:
            self._check_language(file)
        # The public test is used only if it has captions of all selected languages.
        self.files = [(s, file) for s, file in self.files if s != "test" or self._is_used(file)]

    def _is_used(self, file: str) -> bool:
        records = (value for *_, value in self.layout.read(self.source, file))
        first = next((each for each in records if isinstance(each, dict)), {})
        return all(first.get(key) for key in _VATEX_FIELDS[self.options.captions])

    def _check_language(self, file: str) -> None:
        """Check that the first videos have captions of the selected language.

        Raises:
            UserError: they have captions of the other language only.
        """
        first = self.sample(self.source, file)
        present = [
            language
            for language in ("chinese", "english")
            if any(row.get(_VATEX_FIELDS[language][0]) for row in first)
        ]
        if present and self.options.captions not in (*present, "both"):
            raise UserError(
                f"{self.source.path(file)}: has {present[0]} captions only. To use them, give "
                f"--options.{self.name}.captions {present[0]}"
            )

    def read_records(self) -> Iterator[FileRecord | RejectedRow]:
        """Yield videos in the order of the annotations, then those without captions."""
        videos = self._index_videos()
        named: set[str] = set()
        for split, file in self.files:
            for record in self.read_file(split, file):
                yield record._replace(origin=(record.origin, videos, named))
        for name, path in videos.items():
            if name not in named:
                yield RejectedRow(make_key(path), "a video without captions", path)

    def build_record(self, record: FileRecord) -> Row:
        """Return the row of a video."""
        key, videos, named = record.origin
        if not isinstance(record.value, dict):
            raise ValueError("not a JSON object")
        name = record.value.get("videoID", key)
        if not isinstance(name, str) or not name or "/" in name:
            raise ValueError("no videoID")
        youtube = parse_youtube_id(name)
        video = next((known for known in (name, youtube) if known in videos), None)
        if video is not None:
            # Recorded before the captions are checked, so that the video is not reported twice.
            named.add(video)
        fields = _VATEX_FIELDS[self.options.captions]
        captions = clean_captions([c for f in fields for c in _as_list(record.value.get(f))])
        if video is None:
            raise ValueError("captions without a video")
        reference = MediaRef(self.media_source.path(videos[video]))
        split = self.assign_split(record.split, youtube)
        return media_row(split, make_key(name), reference, captions, unit=make_key(youtube))

    def _index_videos(self) -> dict[str, str]:
        """Return name without its ending -> path, of every video below the directory."""
        found: dict[str, str] = {}
        for entry in self.media_source.walk():
            if file_extension(entry.name) in find_modality("video").extensions:
                name = entry.name.rpartition("/")[2].rpartition(".")[0]
                found.setdefault(name, entry.name)
        return found


def _as_list(captions: Any) -> list[Any]:
    """Return captions as a list; some copies of VATEX have one caption as a text."""
    return captions if isinstance(captions, list) else [captions] if captions else []


def parse_youtube_id(name: str) -> str:
    """Return the YouTube id of a videoID: ``"a_b-c_000122_000132" -> "a_b-c"``.

    The id can contain ``_`` and ``-``: it ends before the last two numbers.
    """
    parts = name.rsplit("_", 2)
    return parts[0] if len(parts) == 3 and all(p.isdigit() for p in parts[1:]) else name
