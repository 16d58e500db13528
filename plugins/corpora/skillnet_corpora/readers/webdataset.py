"""Format ``webdataset``: tars whose members with the same name up to the first dot are a sample.

    train-000000.tar    0001.jpg  0001.txt  0002.jpg  0002.txt …
                        0001.wav  0001.json {"transcription": …}      0001.jpg  0001.cls

The name of a sample ends at the first dot after its folders, as in the webdataset library, and its
members are adjacent. A sample has one media file and one text of each kind; further ones are
rejected. Members whose name is empty or starts with a dot belong to no sample, for example the
``._`` files of macOS.

Media are not unpacked: a row refers to a byte range of its tar. A compressed tar is read front to
back. The name of a tar or of its folder decides the split; otherwise splits are made.
"""

import contextlib
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from pipelines.data.corpora.base import RejectedRow, Row, SourceArchives
from pipelines.data.corpora.formats.record_reader import BadRecord, StrictJsonDecoder
from pipelines.data.corpora.readers.base import FileRecord
from pipelines.data.corpora.readers.row_builders import make_key
from pipelines.data.io.archive import TarReader, TarReadError, detect_compression
from pipelines.data.io.directory import SourceDirectory
from pipelines.data.io.media import MediaRef
from pipelines.data.io.source_file import PER_FILE_ERRORS, open_stream
from skillnet_corpora.readers.fields import (
    ALL_SPLITS,
    MODALITY_OF_EXTENSION,
    RecordCorpus,
    parse_split_prefix,
)
from skillnet_corpora.readers.hub_repository import require_all_shards
from skillnet_corpora.readers.metadata_tables import has_metadata_rows
from skillnet_corpora.readers.schema_sample import SchemaSample
from skillnet_corpora.readers.unread_files import missing_format_error
from skillnet_platform import console
from skillnet_platform.errors import UserError

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
#: Endings of texts, JSON apart.
TEXT_EXTENSIONS = (
    *("txt", "text", "caption", "transcript", "transcription"),
    *("cls", "label", "code", "py"),
)
#: Samples that are read of the first tar of each split to infer the schema.
SAMPLE_COUNT = 100
DUPLICATE_MEMBER = (
    "a second file of its kind in one sample; a sample's name ends at its first dot: write other "
    "dots as _"
)
NO_MEDIA_MEMBER = "no media file in a sample; its members must be adjacent (tar --sort=name)"
UNREAD_MEMBER = (
    "a media file in a sample of texts; give the option modality: that of the media, or text"
)
SPARSE_MEMBER = "a sparse file; pack it without --sparse"
#: A longer text rejects its sample.
MAX_TEXT_BYTES = 16 * 2**20


@dataclass
class TarSample:
    """Members of a tar that belong together.

    Attributes:
        key: their common name.
        fields: texts and JSON fields.
        reference: the media file.
        extension: ending of the media file.
        problem: why the sample cannot be used; "" if it can.
        truncates_file: whether the rest of the tar cannot be read.
        surplus: (name, ending) of members beyond the first of their kind.
        kinds_read: kinds of texts that were read.
    """

    key: str
    fields: dict[str, Any] = field(default_factory=dict)
    reference: MediaRef | None = None
    extension: str | None = None
    problem: str = ""
    truncates_file: bool = False
    surplus: list[tuple[str, str]] = field(default_factory=list)
    kinds_read: set[str] = field(default_factory=set)


class WebDatasetCorpus(RecordCorpus):
    """Samples of tars, in the order of the tars and their members."""

    name = "webdataset"
    version = 2  # members of no sample are skipped; the first of two texts of a kind is used

    @classmethod
    def detect(cls, source: SourceDirectory) -> str | None:
        """Return a tar that holds samples as evidence, unless it lies beside metadata."""
        if has_metadata_rows(source):
            return None
        for tar in _list_tars(source)[:1]:
            for sample in islice(_iter_samples(source, tar), 1):
                if sample.reference is not None or sample.fields:
                    return f"{tar or source.name} holds samples of several members"
        return None

    def discover(self) -> None:
        """Find the tars, and infer the schema from the first samples."""
        self.tars = _list_tars(self.source)
        if not self.tars:
            raise missing_format_error(self.source, "no .tar in it or up to three folders below")
        require_all_shards(self.source, self.tars)
        self.named_splits = frozenset(split for tar in self.tars if (split := _split_of_tar(tar)))
        if self.options.split is not None:
            self.named_splits = ALL_SPLITS
        schema, extension = SchemaSample(), None
        sampled: set[str | None] = set()
        for split, tar in self._tars_to_sample():
            if split in sampled:
                continue
            for sample in islice(_iter_samples(self.source, tar), SAMPLE_COUNT):
                if not sample.problem:
                    sampled.add(split)
                    schema.add(split, sample.fields)
                    extension = extension or sample.extension
        if not sampled:
            raise UserError(f"{self.source.uri}: no readable sample in its tars")
        self.infer_schema(schema.names, extension, schema.filled_fields, schema)
        if extension is not None and self._reads_strings:
            console.print_warning(
                f"{self.source.uri}: the media in the samples (.{extension}) are not read, because "
                f"the option modality is {self.modality}"
            )
        self.resolve_test_split(schema)

    def _tars_to_sample(self) -> list[tuple[str | None, str]]:
        """Return (split, tar), training first, because a test can lack its annotations."""
        named = [(_split_of_tar(tar), tar) for tar in self.tars]
        return sorted(named, key=lambda each: each[0] != "train")

    def num_source_files(self) -> int:
        """Return the number of tars."""
        return len(self.tars)

    def rows(self, sources: SourceArchives) -> Iterator[Row | RejectedRow]:
        """Yield the rows of all samples, none of which shares its media file with another."""
        yield from self.build_rows()

    def read_records(self) -> Iterator[FileRecord | RejectedRow]:
        """Yield samples in the order of tars and members, after their surplus members."""
        for tar in self.tars:
            split, file = _split_of_tar(tar), tar or self.source.name
            for number, sample in enumerate(_iter_samples(self.source, tar), start=1):
                key = make_key(file, sample.key)
                for member, extension in sample.surplus:
                    # A second image of the same type usually means that names contain more dots,
                    # so that samples are merged. A mask beside an image is omitted by choice.
                    is_error = sample.reference is None or extension == sample.extension
                    yield RejectedRow(
                        make_key(file, member),
                        DUPLICATE_MEMBER,
                        file,
                        number,
                        counts_as_error=is_error,
                    )
                bad = BadRecord(sample.problem, sample.truncates_file)
                yield FileRecord(file, number, bad if sample.problem else sample, split, key)

    def build_record(self, record: FileRecord) -> Row:
        """Return the row of a sample."""
        reference = record.value.reference
        if reference is None and not self._reads_strings:
            raise ValueError(NO_MEDIA_MEMBER)
        if reference is not None and self._reads_strings and self.options.modality is None:
            raise ValueError(UNREAD_MEMBER)
        return self.build_row(record.key, record.value.fields, reference, record.split)


def _list_tars(source: SourceDirectory) -> list[str]:
    if source.is_file:
        return [""] if source.name.lower().endswith(TAR_SUFFIXES) else []
    return [
        f"{folder}/{entry.name}" if folder else entry.name
        for folder in source.folders(depth=3)
        for entry in source.entries(folder)
        if not entry.is_folder and entry.name.lower().endswith(TAR_SUFFIXES)
    ]


def _split_of_tar(tar: str) -> str | None:
    """Return the split at the start of the name of a tar or of one of its folders, or None."""
    return next((s for part in reversed(tar.split("/")) if (s := parse_split_prefix(part))), None)


def _iter_samples(source: SourceDirectory, tar: str) -> Iterator[TarSample]:
    """Yield the samples of a tar; if the tar is damaged, the last one has the problem."""
    path = source.path(tar)
    current: TarSample | None = None
    try:
        with contextlib.ExitStack() as stack:
            stream = stack.enter_context(open_stream(path))
            compressed = bool(detect_compression(stream))
            reader = TarReader(path, stream, ranges=not compressed)
            archive = stack.enter_context(contextlib.closing(reader))
            for entry in archive:
                folder, _, name = entry.name.removeprefix("./").rpartition("/")
                stem, dot, extension = name.partition(".")
                if not stem or not dot or "__MACOSX" in folder.split("/"):
                    continue
                # Windows writes thumbs.db into folders of images.
                if name.lower() == "thumbs.db":
                    continue
                key = f"{folder}/{stem}" if folder else stem
                if current is None or current.key != key:
                    if current is not None:
                        yield current
                    current = TarSample(key)
                _add_member(current, archive, entry, extension.lower(), path, compressed)
        if current is not None:
            yield current
    except (TarReadError, *PER_FILE_ERRORS) as error:
        is_damaged = isinstance(error, TarReadError)
        reason = str(error) if is_damaged else "the archive cannot be opened"
        current = current or TarSample("")
        # The rows before the damage are valid, so only the current sample is lost.
        current.problem = f"{reason} from here on" if current.key else reason
        current.truncates_file = True
        yield current


def _add_member(
    sample: TarSample,
    archive: TarReader,
    entry: tarfile.TarInfo,
    extension: str,
    path: str,
    compressed: bool,
) -> None:
    last = extension.rpartition(".")[2]
    if last in MODALITY_OF_EXTENSION:
        if sample.reference is not None:
            sample.surplus.append((entry.name, last))
            return
        if entry.issparse():
            # The tar omits the holes of the file, so a byte range of the tar is not the file.
            sample.problem = SPARSE_MEMBER
        if compressed:
            sample.reference = MediaRef(path, member=entry.name)
        else:
            sample.reference = MediaRef(path, entry.offset_data, entry.size)
        sample.extension = last
        return
    if last not in (*TEXT_EXTENSIONS, "json"):
        return
    name = {"py": "code", "label": "cls"}.get(last, last)
    if name in sample.kinds_read:
        sample.surplus.append((entry.name, last))
        return
    sample.kinds_read.add(name)
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
