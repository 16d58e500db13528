"""VATEX: ten-second videos with ten English and ten Chinese captions each.

    vatex_training_v1.0.json, vatex_validation_v1.0.json, vatex_public_test_english_v1.1.json
    <videoID>.mp4 anywhere below the directory

An annotation file is an array of
``{"videoID": "<youtube id>_000122_000132", "enCap": […], "chCap": […]}``, or an object keyed by
videoID. A YouTube id can contain ``_`` and ``-``: it ends before the last two numbers.

The public test has no Chinese captions. It is the test only for English captions. For Chinese or
both, half of the validation videos become the test. Segments of one YouTube video stay together.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Literal

from pipelines.data.corpora.base import RejectedRow, Row, SourceArchives
from pipelines.data.corpora.formats.packed_archives import missing_format_error
from pipelines.data.corpora.formats.record_reader import read_json_entries
from pipelines.data.corpora.readers.base import CaptionOptions, MediaOptions
from pipelines.data.corpora.readers.captions import CaptionedCorpus
from pipelines.data.corpora.readers.fields import file_extension
from pipelines.data.corpora.readers.row_builders import clean_captions, make_key, media_row
from pipelines.data.io.directory import SourceDirectory
from pipelines.data.io.media import MediaRef
from pipelines.data.modalities.video import VideoOptions
from skillnet.modality import find_modality
from skillnet_platform.errors import UserError

#: Videos that are checked for captions of a language.
SAMPLE_VIDEOS = 100
FIELDS = {"chinese": ("chCap",), "english": ("enCap",), "both": ("chCap", "enCap")}


@dataclass
class VatexOptions(CaptionOptions, VideoOptions, MediaOptions):
    """VATEX.

    Args:
        captions: "chinese", "english", or "both" with the Chinese captions first.
    """

    captions: Literal["chinese", "english", "both"] = "chinese"


class VatexCorpus(CaptionedCorpus):
    """Videos with all of their captions."""

    name = "vatex"
    modality = "video"
    Options = VatexOptions
    version = 2  # "both" needs a test with captions of both languages

    @classmethod
    def detect(cls, source: SourceDirectory) -> str | None:
        """Return the name of an annotation file as evidence."""
        found = list(_annotation_files(source))
        return f"{found[0][1]} is an annotation file of VATEX" if found else None

    def discover(self) -> None:
        """Find the annotation files."""
        files = list(_annotation_files(self.source))
        if not files:
            raise missing_format_error(
                self.source,
                "no vatex_training_v1.0.json in it or up to three folders below; VATEX consists "
                "of such files and of videos named by videoID",
            )
        for _, file in sorted(each for each in files if each[0] != "test")[:1]:
            self._check_language(file)
        # The public test is used only if it has captions of all selected languages.
        used = [(s, file) for s, file in files if s != "test" or self._has_captions(file)]
        self.set_annotation_files(used)

    def _check_language(self, file: str) -> None:
        """Check that the first videos have captions of the selected language.

        Raises:
            UserError: they have captions of the other language only.
        """
        sample = islice(read_json_entries(self.source, file), SAMPLE_VIDEOS)
        first = [record for _, _, record in sample]
        present = [
            language
            for language in ("chinese", "english")
            if any(isinstance(r, dict) and r.get(FIELDS[language][0]) for r in first)
        ]
        if present and self.options.captions not in (*present, "both"):
            raise UserError(
                f"{self.source.path(file)}: has {present[0]} captions only. To use them, give "
                f"--options.{self.name}.captions {present[0]}"
            )

    def rows(self, sources: SourceArchives) -> Iterator[Row | RejectedRow]:
        """Yield videos in the order of the annotations, then those without captions."""
        videos = self._index_videos()
        named: set[str] = set()
        for split, file in self.files:
            yield from self.annotated_rows(file, partial(self._build_row, split, videos, named))
        for name, path in videos.items():
            if name not in named:
                yield RejectedRow(make_key(path), "a video without captions", path)

    def _build_row(
        self, split: str, videos: dict[str, str], named: set[str], key: str | None, record: Any
    ) -> Row:
        if not isinstance(record, dict):
            raise ValueError("not a JSON object")
        name = record.get("videoID", key)
        if not isinstance(name, str) or not name or "/" in name:
            raise ValueError("no videoID")
        youtube = parse_youtube_id(name)
        video = next((known for known in (name, youtube) if known in videos), None)
        if video is not None:
            # Recorded before the captions are checked, so that the video is not reported twice.
            named.add(video)
        fields = FIELDS[self.options.captions]
        captions = clean_captions([c for f in fields for c in _as_list(record.get(f))])
        if video is None:
            raise ValueError("captions without a video")
        reference = MediaRef(self.media_source.path(videos[video]))
        final, unit = self.assign_split(split, youtube), make_key(youtube)
        return media_row(final, make_key(name), reference, captions, unit=unit)

    def _index_videos(self) -> dict[str, str]:
        """Return name without its ending -> path, of every video below the directory."""
        found: dict[str, str] = {}
        for entry in self.media_source.walk():
            if file_extension(entry.name) in find_modality("video").extensions:
                name = entry.name.rpartition("/")[2].rpartition(".")[0]
                found.setdefault(name, entry.name)
        return found

    def _has_captions(self, file: str) -> bool:
        for _, _, record in read_json_entries(self.source, file):
            if isinstance(record, dict):
                return all(record.get(key) for key in FIELDS[self.options.captions])
        return False


def _as_list(captions: Any) -> list[Any]:
    """Return captions as a list; some copies of VATEX have one caption as a text."""
    return captions if isinstance(captions, list) else [captions] if captions else []


def parse_youtube_id(name: str) -> str:
    """Return the YouTube id of a videoID: ``"a_b-c_000122_000132" -> "a_b-c"``."""
    parts = name.rsplit("_", 2)
    return parts[0] if len(parts) == 3 and all(p.isdigit() for p in parts[1:]) else name


def _annotation_files(source: SourceDirectory) -> Iterator[tuple[str, str]]:
    """Yield (split, file) of the annotation files, training first."""
    if source.is_file:
        return
    found: dict[str, str] = {}
    for folder in source.folders(depth=3):
        for entry in source.entries(folder):
            name = entry.name.lower()
            if entry.is_folder or not (name.startswith("vatex_") and name.endswith(".json")):
                continue
            split = next((s for s in ("train", "validation", "test") if s in name), None)
            # The private test has no captions.
            if split and "private" not in name:
                found.setdefault(split, f"{folder}/{entry.name}" if folder else entry.name)
    yield from found.items()
