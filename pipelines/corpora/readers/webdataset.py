"""WebDataset: tars whose members share a name up to its first dot and belong together.

    train-000000.tar    0001.jpg  0001.txt  0002.jpg  0002.txt …
                        0001.wav  0001.json {"transcription": …}      0001.jpg  0001.cls

A sample's name ends at the first dot behind its folders, as the webdataset library has it, and its
members stand one after the other. It has one medium, and one text of a kind: what a second one says
is set aside. Members whose name begins with a dot, or has none, are of no sample: the ``._`` files
of macOS among them. Media are not unpacked: a row refers to a range of bytes of its tar (a
compressed one is read front to back). The split is named by the tar or its folder, else made.
"""

import contextlib
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from pipelines.corpora.base import RejectedRow, Row, SourceArchives
from pipelines.corpora.formats.packed import missing_format_error
from pipelines.corpora.formats.record_reader import BadRecord, StrictJsonDecoder
from pipelines.corpora.formats.schema_sample import SchemaSample
from pipelines.corpora.readers.base import error_row, make_key, rejected_row
from pipelines.corpora.readers.fields import (
    ALL_SPLITS,
    MEDIA_EXTENSIONS,
    MODALITY_OF_EXTENSION,
    RecordCorpus,
    parse_split_prefix,
)
from pipelines.corpora.readers.folder import has_metadata_rows
from pipelines.io.archive import detect_compression
from pipelines.io.directory import SourceDirectory
from pipelines.io.media import MediaRef
from pipelines.io.source_file import PER_FILE_ERRORS, open_stream
from pipelines.io.tar import TarReader, TarReadError
from skillnet_platform.errors import UserError

TARS = (".tar", ".tar.gz", ".tgz")
TEXT_EXTENSIONS = (
    "txt",
    "text",
    "caption",
    "transcript",
    "transcription",
    "cls",
    "label",
    "code",
    "py",
)
#: Samples that are looked at, of the first tar of each split.
SAMPLE_COUNT = 100
#: Why a member is not read that has the name of a sample.
DUPLICATE_MEMBER = (
    "a second file of its kind in one sample; a sample's name ends at its first dot: write other "
    "dots as _"
)
#: Why a sample of texts is none of pictures.
NO_MEDIA_MEMBER = (
    "no media file in a sample; its members must stand one after the other (tar --sort=name)"
)
#: Why a medium of a sample is none.
SPARSE_MEMBER = "a sparse file; pack it without --sparse"
#: Texts beyond this are not read into the row.
MAX_TEXT_BYTES = 16 * 2**20


@dataclass
class TarSample:
    """Members of a tar that belong together."""

    key: str
    fields: dict[str, Any] = field(default_factory=dict)
    reference: MediaRef | None = None
    ending: str | None = None
    problem: str = ""
    truncates_file: bool = False
    #: Members for which there is no room in it, and their endings.
    lost: list[tuple[str, str]] = field(default_factory=list)
    #: Kinds of texts that were read.
    read: set[str] = field(default_factory=set)


class WebDatasetCorpus(RecordCorpus):
    """Samples of tars, in their order."""

    name = "webdataset"
    version = 2  # members of no sample are passed over; of two texts of a kind the first is taken

    @classmethod
    def detect(cls, place: SourceDirectory) -> str | None:
        """Tars with media and texts that share names, unless they lie beside metadata."""
        if has_metadata_rows(place):
            return None
        for tar in _tars(place)[:1]:
            for sample in islice(_samples(place, tar), 1):
                if sample.reference is not None or sample.fields:
                    return f"{tar or place.name} holds samples of several members"
        return None

    def discover(self) -> None:
        """Find the tars; see what the first sample has."""
        self.tars = _tars(self.source)
        if not self.tars:
            raise missing_format_error(self.source, "no .tar in it or up to three folders below")
        self.named_splits = frozenset(split for tar in self.tars if (split := _split_of(tar)))
        if self.options.split is not None:
            self.named_splits = ALL_SPLITS
        glance, ending = SchemaSample(), None
        looked_at: set[str | None] = set()
        for split, tar in self._tars_to_look_at():
            if split in looked_at:
                continue
            for sample in islice(_samples(self.source, tar), SAMPLE_COUNT):
                if not sample.problem:
                    looked_at.add(split)
                    glance.add(split, sample.fields)
                    ending = ending or sample.ending
        if not looked_at:
            raise UserError(f"{self.source.uri}: no readable sample in its tars")
        self.infer_schema(glance.names, ending, glance.filled_fields)
        self.resolve_test_split(glance)

    def _tars_to_look_at(self) -> list[tuple[str | None, str]]:
        """(Split, tar), training first: a test may lack what it asks for."""
        named = [(_split_of(tar), tar) for tar in self.tars]
        return sorted(named, key=lambda each: each[0] != "train")

    def num_source_files(self) -> int:
        """The tars."""
        return len(self.tars)

    def rows(self, sources: SourceArchives) -> Iterator[Row | RejectedRow]:
        """Samples in the order of tars and members."""
        for tar in self.tars:
            split, file = _split_of(tar), tar or self.source.name
            for number, sample in enumerate(_samples(self.source, tar), start=1):
                key = make_key(file, sample.key)
                for member, ending in sample.lost:
                    # Of a picture and its mask the mask is left out by choice.
                    alike = sample.reference is None or ending == sample.ending
                    yield RejectedRow(
                        make_key(file, member),
                        DUPLICATE_MEMBER,
                        file,
                        number,
                        counts_as_error=alike,
                    )
                if sample.problem:
                    yield error_row(key, sample.problem, file, number, sample.truncates_file)
                    continue
                if sample.reference is None and self.modality in MEDIA_EXTENSIONS:
                    yield error_row(key, NO_MEDIA_MEMBER, file, number)
                    continue
                try:
                    row = self.build_row(key, sample.fields, sample.reference, split)
                except ValueError as problem:
                    yield rejected_row(key, problem, file, number)
                    continue
                yield row | {"file": file, "row": number}


def _tars(place: SourceDirectory) -> list[str]:
    if place.is_file:
        return [""] if place.name.lower().endswith(TARS) else []
    return [
        f"{folder}/{entry.name}" if folder else entry.name
        for folder in place.folders(depth=3)
        for entry in place.entries(folder)
        if not entry.is_folder and entry.name.lower().endswith(TARS)
    ]


def _split_of(tar: str) -> str | None:
    """The split that a tar's name or folder begins with."""
    return next((s for part in reversed(tar.split("/")) if (s := parse_split_prefix(part))), None)


def _samples(place: SourceDirectory, tar: str) -> Iterator[TarSample]:
    """Samples of a tar; the last one tells of damage."""
    path = place.path(tar)
    current: TarSample | None = None
    try:
        with contextlib.ExitStack() as stack:
            stream = stack.enter_context(open_stream(path))
            packed = bool(detect_compression(stream))
            archive = stack.enter_context(
                contextlib.closing(TarReader(path, stream, ranges=not packed))
            )
            for entry in archive:
                folder, _, name = entry.name.removeprefix("./").rpartition("/")
                stem, dot, ending = name.partition(".")
                if not stem or not dot or "__MACOSX" in folder.split("/"):
                    continue
                if name.lower() == "thumbs.db":
                    continue
                key = f"{folder}/{stem}" if folder else stem
                if current is None or current.key != key:
                    if current is not None:
                        yield current
                    current = TarSample(key)
                _add(current, archive, entry, ending.lower(), path, packed)
        if current is not None:
            yield current
    except (TarReadError, *PER_FILE_ERRORS) as problem:
        told = str(problem) if isinstance(problem, TarReadError) else "the archive cannot be opened"
        current = current or TarSample("")
        current.problem, current.truncates_file = (
            f"{told} from here on" if current.key else told,
            True,
        )
        yield current


def _add(
    sample: TarSample,
    archive: TarReader,
    entry: tarfile.TarInfo,
    ending: str,
    path: str,
    packed: bool,
) -> None:
    last = ending.rpartition(".")[2]
    if last in MODALITY_OF_EXTENSION:
        if sample.reference is not None:
            sample.lost.append((entry.name, last))
            return
        if entry.issparse():  # its holes are not in the tar: a range of it is another file
            sample.problem = SPARSE_MEMBER
        if packed:
            sample.reference = MediaRef(path, member=entry.name)
        else:
            sample.reference = MediaRef(path, entry.offset_data, entry.size)
        sample.ending = last
        return
    if last not in (*TEXT_EXTENSIONS, "json"):
        return
    name = {"py": "code", "label": "cls"}.get(last, last)
    if name in sample.read:
        sample.lost.append((entry.name, last))
        return
    sample.read.add(name)
    if entry.size > MAX_TEXT_BYTES:
        sample.problem = "a text longer than 16 MiB"
        return
    data = archive.read(entry)
    try:
        text = data.decode("utf-8-sig")
        if last == "json":
            value = StrictJsonDecoder().decode(text)
            if isinstance(value, BadRecord):
                sample.problem = value.reason
            else:
                sample.fields |= value if isinstance(value, dict) else {"captions": value}
        else:
            sample.fields[name] = text
    except UnicodeDecodeError:
        sample.problem = "not UTF-8"
    except (ValueError, RecursionError):
        sample.problem = "not JSON"
