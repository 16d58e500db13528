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

from pipelines.corpora.base import Rejected, Row, Sources
from pipelines.corpora.formats.packed import lacking
from pipelines.corpora.formats.record_reader import Broken, entries
from pipelines.corpora.readers.base import (
    CaptionedCorpus,
    MediaOptions,
    bad,
    clean_captions,
    half,
    key_of,
    media_row,
)
from pipelines.corpora.readers.columns import CaptionOptions, VideoOptions
from pipelines.corpora.readers.fields import ENDINGS, ending_of
from pipelines.io.directory import Place
from pipelines.io.media import MediaRef
from skillnet_platform.errors import UserError

#: So many clips are looked at for captions.
LOOKED_AT = 100
FIELDS = {"chinese": ("chCap",), "english": ("enCap",), "both": ("chCap", "enCap")}


@dataclass
class VatexOptions(CaptionOptions, VideoOptions, MediaOptions):
    """VATEX.

    Args:
        captions: "chinese", "english" or "both", Chinese ones first.
    """

    captions: Literal["chinese", "english", "both"] = "chinese"


class Vatex(CaptionedCorpus):
    """Clips, each with all of its captions."""

    name = "vatex"
    modality = "video"
    Options = VatexOptions
    version = 2  # "both" needs a test with both

    @classmethod
    def guess(cls, place: Place) -> str | None:
        """A file of annotations."""
        found = list(_annotations(place))
        return f"{found[0][1]} is an annotation file of VATEX" if found else None

    def locate(self) -> None:
        """Find the files of annotations."""
        files = list(_annotations(self.place))
        if not files:
            raise lacking(
                self.place,
                "no vatex_training_v1.0.json in it or up to three folders below; VATEX is such "
                "files and clips named by videoID",
            )
        for _, file in sorted(each for each in files if each[0] != "test")[:1]:
            self._look(file)
        # The public test is of use only if it holds all the captions that are asked for.
        self.take([(s, file) for s, file in files if s != "test" or self._captioned(file)])

    def _look(self, file: str) -> None:
        """At the first clips: whether they have captions of the language that is asked for.

        Raises:
            UserError: they have those of the other alone.
        """
        first = [record for _, _, record in islice(entries(self.place, file), LOOKED_AT)]
        there = [
            language
            for language in ("chinese", "english")
            if any(isinstance(r, dict) and r.get(FIELDS[language][0]) for r in first)
        ]
        if there and self.options.captions not in (*there, "both"):
            raise UserError(
                f"{self.place.path(file)}: its captions are {there[0]} alone; to take them, give "
                f"--options.{self.name}.captions {there[0]}"
            )

    def rows(self, sources: Sources) -> Iterator[Row | Rejected]:
        """Clips in the order of the annotations, then those that nobody describes."""
        clips = self._clips()
        told: set[str] = set()
        for split, file in self.files:
            for number, name, record in entries(self.place, file):
                key = key_of(f"{file}:{number}")
                if isinstance(record, Broken):
                    yield bad(key, record.reason, file, number, record.rest)
                    continue
                try:
                    row = self._row(split, name, record, clips, told)
                except ValueError as problem:
                    yield bad(key, str(problem), file, number)
                    continue
                yield row | {"file": file, "row": number}
        for name, path in clips.items():
            if name not in told:
                yield Rejected(key_of(path), "a clip without captions", path)

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
        if split == "validation" and self.halved:
            split = half(youtube)
        return media_row(split, key_of(name), MediaRef(self.home.path(clips[clip])), captions)

    def _clips(self) -> dict[str, str]:
        """Name without its ending -> path, of every clip below the folder."""
        found: dict[str, str] = {}
        for entry in self.home.walk():
            if ending_of(entry.name) in ENDINGS["video"]:
                name = entry.name.rpartition("/")[2].rpartition(".")[0]
                found.setdefault(name, entry.name)
        return found

    def _captioned(self, file: str) -> bool:
        for _, _, record in entries(self.place, file):
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


def _annotations(place: Place) -> Iterator[tuple[str, str]]:
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
