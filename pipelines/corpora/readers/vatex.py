"""VATEX: ten-second clips with ten English and ten Chinese captions each.

    vatex_training_v1.0.json, vatex_validation_v1.0.json, vatex_public_test_english_v1.1.json
    <videoID>.mp4 anywhere below the folder

The files are an array of ``{"videoID": "<youtube id>_000122_000132", "enCap": […], "chCap": […]}``,
or an object keyed by videoID. The public test has no Chinese: with Chinese captions the validation
clips are parted in halves by their YouTube video, one of them the test, and so they are with both;
with English ones the public test is the test. A YouTube id may hold ``_`` and ``-``: it ends before
the last two numbers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

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
from pipelines.corpora.readers.columns import CaptionOptions, VideoOptions
from pipelines.corpora.readers.fields import MEDIA_EXTENSIONS, file_extension
from pipelines.io.directory import SourceDirectory
from pipelines.io.media import MediaRef
from skillnet_platform.errors import UserError

#: So many clips are looked at for captions.
SAMPLE_VIDEOS = 100
FIELDS = {"chinese": ("chCap",), "english": ("enCap",), "both": ("chCap", "enCap")}


@dataclass
class VatexOptions(CaptionOptions, VideoOptions, MediaOptions):
    """VATEX.

    Args:
        captions: "chinese", "english" or "both", Chinese ones first.
    """

    captions: Literal["chinese", "english", "both"] = "chinese"


class VatexCorpus(CaptionedCorpus):
    """Clips, each with all of its captions."""

    name = "vatex"
    modality = "video"
    Options = VatexOptions
    version = 2  # "both" needs a test with both

    @classmethod
    def detect(cls, place: SourceDirectory) -> str | None:
        """A file of annotations."""
        found = list(_annotations(place))
        return f"{found[0][1]} is an annotation file of VATEX" if found else None

    def discover(self) -> None:
        """Find the files of annotations."""
        files = list(_annotations(self.source))
        if not files:
            raise missing_format_error(
                self.source,
                "no vatex_training_v1.0.json in it or up to three folders below; VATEX is such "
                "files and clips named by videoID",
            )
        for _, file in sorted(each for each in files if each[0] != "test")[:1]:
            self._look(file)
        # The public test is of use only if it holds all the captions that are asked for.
        self.set_annotation_files(
            [(s, file) for s, file in files if s != "test" or self._captioned(file)]
        )

    def _look(self, file: str) -> None:
        """At the first clips: whether they have captions of the language that is asked for.

        Raises:
            UserError: they have those of the other alone.
        """
        first = [
            record for _, _, record in islice(read_json_entries(self.source, file), SAMPLE_VIDEOS)
        ]
        there = [
            language
            for language in ("chinese", "english")
            if any(isinstance(r, dict) and r.get(FIELDS[language][0]) for r in first)
        ]
        if there and self.options.captions not in (*there, "both"):
            raise UserError(
                f"{self.source.path(file)}: its captions are {there[0]} alone; to take them, give "
                f"--options.{self.name}.captions {there[0]}"
            )

    def rows(self, sources: SourceArchives) -> Iterator[Row | RejectedRow]:
        """Clips in the order of the annotations, then those that nobody describes."""
        clips = self._clips()
        told: set[str] = set()
        for split, file in self.files:
            for number, name, record in read_json_entries(self.source, file):
                key = make_key(f"{file}:{number}")
                if isinstance(record, BadRecord):
                    yield error_row(key, record.reason, file, number, record.truncates_file)
                    continue
                try:
                    row = self._row(split, name, record, clips, told)
                except ValueError as problem:
                    yield error_row(key, str(problem), file, number)
                    continue
                yield row | {"file": file, "row": number}
        for name, path in clips.items():
            if name not in told:
                yield RejectedRow(make_key(path), "a clip without captions", path)

    def _row(
        self, split: str, key: str | None, record: Any, clips: dict[str, str], told: set[str]
    ) -> Row:
        if not isinstance(record, dict):
            raise ValueError("not a JSON object")
        name = record.get("videoID", key)
        if not isinstance(name, str) or not name or "/" in name:
            raise ValueError("no videoID")
        youtube = youtube_id(name)
        clip = next((known for known in (name, youtube) if known in clips), None)
        if clip is not None:
            told.add(clip)
        captions = clean_captions(
            [c for key in FIELDS[self.options.captions] for c in _listed(record.get(key))]
        )
        if clip is None:
            raise ValueError("captions without a clip")
        if split == "validation" and self.lacks_test:
            split = val_or_test(youtube)
        return media_row(
            split, make_key(name), MediaRef(self.media_source.path(clips[clip])), captions
        )

    def _clips(self) -> dict[str, str]:
        """Name without its ending -> path, of every clip below the folder."""
        found: dict[str, str] = {}
        for entry in self.media_source.walk():
            if file_extension(entry.name) in MEDIA_EXTENSIONS["video"]:
                name = entry.name.rpartition("/")[2].rpartition(".")[0]
                found.setdefault(name, entry.name)
        return found

    def _captioned(self, file: str) -> bool:
        for _, _, record in read_json_entries(self.source, file):
            if isinstance(record, dict):
                return all(record.get(key) for key in FIELDS[self.options.captions])
        return False


def _listed(captions: Any) -> list[Any]:
    """Captions as a list: some copies have one alone, as a text."""
    return captions if isinstance(captions, list) else [captions] if captions else []


def youtube_id(name: str) -> str:
    """``"a_b-c_000122_000132" -> "a_b-c"``: what stands before the last two numbers."""
    parts = name.rsplit("_", 2)
    return parts[0] if len(parts) == 3 and all(p.isdigit() for p in parts[1:]) else name


def _annotations(place: SourceDirectory) -> Iterator[tuple[str, str]]:
    """(Split, file) of every file of annotations: training first."""
    if place.is_file:
        return
    found: dict[str, str] = {}
    for folder in place.folders(depth=3):
        for entry in place.entries(folder):
            name = entry.name.lower()
            if entry.is_folder or not (name.startswith("vatex_") and name.endswith(".json")):
                continue
            part = next((p for p in ("train", "validation", "test") if p in name), None)
            if part and "private" not in name:
                found.setdefault(part, f"{folder}/{entry.name}" if folder else entry.name)
    yield from found.items()
