"""Base class of corpora that read data by path, and the helpers that their readers share.

A subclass of :class:`ExternalCorpus` reads one format. It reads records and builds a row of each.
Both are cheap and hold at most one record, plus file names where files are looked up by name. It
decides keys, splits and groups, and yields references to media. Media are decoded later in
``transform``, on workers, a block at a time.

Formats of other packages join through the entry point group ``skillnet.corpora``. They import from
``pipelines.data.corpora.readers``; docs/reference/plugins.md has an example.

Files of one corpus can write a label in several ways: ``1``, ``1.0`` and ``true`` in JSON, CSV and
Parquet. Only the value decides the class.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any, ClassVar, NamedTuple

import pyarrow as pa
from annotated_types import Interval

from pipelines.data.config.bounds import BoundedOptions
from pipelines.data.corpora.base import Corpus, RejectedRow, Row, SourceArchives, measure_texts
from pipelines.data.corpora.formats.encoding import BadRecord
from pipelines.data.corpora.formats.record_reader import read_json_entries, read_records
from pipelines.data.corpora.readers.row_builders import UnwantedRowError, error_row, make_key
from pipelines.data.io.directory import (
    DirectoryEntry,
    SourceDirectory,
    digest_listing,
    to_printable,
)
from pipelines.data.io.media import MAX_MEDIA_BYTES
from pipelines.data.modalities.base import ColumnArrays, ModalityFiles
from pipelines.data.transforms import text
from skillnet.modality import CAPTION_MODALITY, find_modality
from skillnet.skills import name_task
from skillnet_platform import console
from skillnet_platform.config import to_dict
from skillnet_platform.config.bounds import PartialFraction, PositiveCount
from skillnet_platform.errors import UserError

#: CTC symbol of characters that do not occur in the training transcripts.
UNKNOWN_SYMBOL = "<unk>"
#: Annotation -> column from which its classes, symbols or scale are collected.
LABEL_COLUMNS = {
    "labels": "label",
    "label_sets": "label_set",
    "values": "value",
    "transcripts": "text",
}
#: Approximate size of a shard in bytes. It decides the number of rows per shard.
TARGET_SHARD_BYTES = 32 * 2**20


@dataclass
class SplitOptions(BoundedOptions):
    """Shares of splits that the corpus does not define; a hash of the key assigns each row.

    Args:
        validation: share of the rows that are held out for validation.
        test: share of the rows that are held out for the test.
    """

    validation: PartialFraction = 0.05
    test: PartialFraction = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validation + self.test >= 1:
            raise ValueError(
                "validation and test together must be below 1, so that rows are left to train on"
            )


@dataclass
class CaptionOptions(BoundedOptions):
    """Captions.

    Args:
        max_caption_tokens: tokens kept of a caption.
        max_caption_characters: characters kept of a caption before it is tokenized.
    """

    max_caption_tokens: PositiveCount = text.CAPTION_TOKENS
    max_caption_characters: PositiveCount = 1_000


@dataclass
class MediaOptions(BoundedOptions):
    """Media files.

    Args:
        media: folder of the media, if it is not the directory of the corpus.
        max_megabytes: a larger media file is rejected without being read.
    """

    media: str | None = None
    max_megabytes: Annotated[int, Interval(ge=1, le=2**20)] = MAX_MEDIA_BYTES // 2**20


class FileRecord(NamedTuple):
    """A record of a file, of which a reader builds one row.

    Args:
        file: the file, as the report of rejected rows names it.
        number: number of the record in the file, from 1; None if the file is the record.
        value: content of the record, or why it cannot be read.
        split: split that the file names, if it names one.
        key: key of the row; by default file and number.
        origin: further facts about the file that the reader needs.
    """

    file: str
    number: int | None
    value: Any
    split: str | None = None
    key: str = ""
    origin: Any = None


class ExternalCorpus(Corpus):
    """A corpus in one format, read from a path or URI of the user.

    A reader yields records in ``read_records`` and makes a row of one record in ``build_record``.

    Args:
        place: path or URI of the corpus.
        options: an instance of ``Options``; None uses the defaults.
        name: name of the prepared corpus; by default the name of the format.

    Attributes:
        source: the directory or file at ``place``.

    Raises:
        UserError: the path does not exist, or does not hold this format.
    """

    archives = ()
    #: Dataclass of the options of the format.
    Options: ClassVar[type]
    #: Annotations of a row in addition to its media: of "labels", "label_sets", "values",
    #: "captions", "transcripts".
    annotations_present: tuple[str, ...] = ()
    #: Whether the captions of a row are equivalent. Then each one is a query in an evaluation,
    #: otherwise only the first one.
    captions_equivalent: ClassVar[bool] = False
    #: Splits whose rows have no annotations: for prediction, or for pretraining.
    unlabelled_splits: tuple[str, ...] = ()
    #: Class names, in the order of their label ids.
    labels: Sequence[str] = ()
    #: CTC symbols; the first one has the id 1.
    symbols: Sequence[str] = ()
    #: Whether the corpus gives its classes as names, which are no numbers to predict.
    has_class_names: bool = False
    #: Splits that the corpus itself defines; None for a format that always has its own.
    named_splits: frozenset[str] | None = None
    #: Whether many directories have the format, so that a corpus is called like its directory.
    is_general: ClassVar[bool] = False
    #: Whether ``rows`` only shows the rows, and may start before all of them are known.
    is_preview: bool = False
    #: Mean and deviation of the values of the training rows.
    value_scale: tuple[float, float] | None = None

    def __init__(self, place: str, options: Any = None, name: str | None = None) -> None:
        self.name = name or type(self).name
        self.source = SourceDirectory(place)
        self.options = options if options is not None else type(self).Options()
        self.discover()
        self.finalize_schema()

    @classmethod
    def detect(cls, source: SourceDirectory) -> str | None:
        """Return the evidence that a directory holds this format as a phrase, or None."""
        return None

    @classmethod
    def explain(cls, source: SourceDirectory) -> str:
        """Return why a path that no format reads is not read, and the remedy; "" if unknown."""
        return ""

    def discover(self) -> None:
        """Find the files of the corpus in ``source``.

        Raises:
            UserError: a file is missing without which no row can be read.
        """

    @property
    def modality_files(self) -> ModalityFiles:
        """File half of the modality of the rows."""
        half: ModalityFiles = find_modality(self.modality).file_half
        return half

    def finalize_schema(self) -> None:
        """Set columns, task and shard size from modality, options and annotations."""
        modality, annotations = find_modality(self.modality), self.annotations_present
        self.raw_schema = make_raw_schema(self.modality_files, annotations)
        fields = [
            *self.modality_files.shard_fields(self.options),
            *list_annotation_fields(annotations),
        ]
        self.columns = pa.schema(fields)
        self.text_columns = tuple(
            [modality.content_column] * modality.reads_tokens
            + ["captions"] * ("captions" in annotations)
        )
        size = self.modality_files.estimate_row_bytes(self.options)
        # Shards of few rows are slow to open; shards of many rows need much memory.
        self.shard_rows = min(max(TARGET_SHARD_BYTES // size, 64), 8192)
        self.task = name_task(self.modality, self.annotations_present)

    def can_run_remotely(self) -> bool:
        """Return whether all media are named by URI, so that any node can read them."""
        return all(each.remote for each in vars(self).values() if isinstance(each, SourceDirectory))

    def scan_labels(self) -> None:
        """Collect classes, symbols and the scale of values, which only the rows contain.

        It costs one pass over ``rows`` before preparation, and runs only if they are missing.
        """
        if self.lacks_labels():
            self.collect_labels(self.rows(SourceArchives.none()), {})

    def lacks_labels(self) -> bool:
        """Return whether the rows have classes, symbols or values that are not collected yet."""
        return any(self._list_missing_labels())

    def _list_missing_labels(self) -> tuple[bool, bool, bool]:
        """Return whether classes, symbols, and the scale of values are missing."""
        wants_labels = self._has_labels() and not self.labels
        wants_symbols = "transcripts" in self.annotations_present and not self.symbols
        wants_scale = "values" in self.annotations_present and self.value_scale is None
        return wants_labels, wants_symbols, wants_scale

    def collect_labels(
        self, rows: Iterable[Row | RejectedRow], known_errors: Mapping[str, int]
    ) -> None:
        """Collect the missing classes, symbols and scale of values from rows.

        Args:
            rows: rows with the column of ``LABEL_COLUMNS`` and their splits; all of them for
                values, else those with different labels.
            known_errors: reason -> error rows that ``rows`` lacks, for the message.
        """
        wants_labels, wants_symbols, wants_scale = self._list_missing_labels()
        labels: set[str] = set()
        values = RunningMoments()
        characters: set[str] = set()
        errors = Counter(known_errors)
        for row in rows:
            if isinstance(row, RejectedRow):
                errors[row.reason] += row.counts_as_error
                continue
            if reason := measure_texts(row)[1]:
                errors[reason] += 1
                continue
            # A class or character that training lacks cannot be learned.
            if row["split"] != "train":
                continue
            if wants_labels:
                labels.update(row.get("label_set") or ())
                labels |= set() if row.get("label") is None else {row["label"]}
            if wants_scale and row.get("value") is not None:
                values.add(row["value"])
            if wants_symbols:
                characters.update(row.get("text") or "")
        if wants_scale:
            self.value_scale = values.scale(self.source.uri)
        self.set_labels(sort_labels(merge_equal_labels(labels)), sorted(characters), errors)
        is_single = wants_labels and "labels" in self.annotations_present
        is_single = is_single and not self.has_class_names
        if report := describe_numeric_labels(self.labels if is_single else ()):
            console.print_warning(f"{self.source.uri}: {report}")

    def set_labels(
        self,
        labels: Sequence[str],
        characters: Sequence[str],
        errors: Mapping[str, int] | None = None,
    ) -> None:
        """Set the classes, and the symbols from the characters of the training transcripts.

        Args:
            labels: class names in the order of their ids.
            characters: sorted characters.
            errors: reason -> number of error rows, for the message.

        Raises:
            UserError: there are no labels or transcripts, so nothing can be trained. The message
                states the most frequent reason in ``errors``.
        """
        (reason, count), *_ = [*Counter(errors).most_common(1), ("", 0)]
        cause = f" ({count} × {reason})" if count else ""
        if self._has_labels() and not self.labels:
            if not labels:
                raise UserError(f"{self.source.uri}: no training row has a label{cause}")
            self.labels = tuple(labels)
        if "transcripts" in self.annotations_present and not self.symbols:
            if not characters:
                raise UserError(f"{self.source.uri}: no training row has a transcript{cause}")
            self.symbols = (UNKNOWN_SYMBOL, *characters)

    def _has_labels(self) -> bool:
        """Return whether rows have one class, or several."""
        return bool({"labels", "label_sets"} & set(self.annotations_present))

    def rows(self, sources: SourceArchives) -> Iterator[Row | RejectedRow]:
        """Yield every row, in an order that depends only on the corpus; see ``Corpus.rows``."""
        yield from self.build_rows()

    def build_rows(self) -> Iterator[Row | RejectedRow]:
        """Yield the rows of all records, and one rejected row for each that cannot be used."""
        for record in self.read_records():
            if isinstance(record, RejectedRow):
                yield record
                continue
            file, number, value, split, key, origin = record
            if not key:
                key = make_key(f"{file}:{number}")
                record = FileRecord(file, number, value, split, key, origin)
            if isinstance(value, BadRecord):
                yield error_row(key, value.reason, file, number, value.truncates_file)
                continue
            try:
                row = self.build_record(record)
            except ValueError as error:
                is_error = not isinstance(error, UnwantedRowError)
                yield RejectedRow(key, str(error), file, number, counts_as_error=is_error)
                continue
            if number is not None:
                row["file"], row["row"] = file, number
            yield row

    def read_records(self) -> Iterator[FileRecord | RejectedRow]:
        """Yield the records of all files; those that are rejected without a look as such."""
        raise NotImplementedError

    def build_record(self, record: FileRecord) -> Row:
        """Return the row of a record.

        Args:
            record: its value can be read, and its key is set.

        Raises:
            UnwantedRowError: the record is no row by choice; the text is the reason.
            ValueError: the record cannot be used; the text is the reason.
        """
        raise NotImplementedError

    def build_columns(self, block: pa.Table, tokenizer: Any = None) -> dict[str, Any]:
        """Return the input columns of the modality, and ``rejected`` with reasons.

        Args:
            block: raw rows.
            tokenizer: needed for text and code.
        """
        limit = getattr(self.options, "max_megabytes", 0) * 2**20 or MAX_MEDIA_BYTES
        built = self.modality_files.build_columns(block, tokenizer, self.options, limit)
        return {"rejected": pa.nulls(block.num_rows, pa.string())} | built

    def transform(self, block: pa.Table, tokenizer: Any) -> pa.Table:
        """Return the finished columns of a block, row for row; see ``Corpus.transform``."""
        built = self.build_columns(block, tokenizer)
        rejected = built.pop("rejected").to_pylist()
        if "captions" in self.annotations_present:
            built |= build_caption_columns(block, tokenizer, self.options)
        if "transcripts" in self.annotations_present:
            built["text"] = block["text"]
            built["symbols"] = self._encode_symbols(block["text"].to_pylist())
        if "labels" in self.annotations_present:
            row_labels = block["label"].to_pylist()
            row_ids = self._encode_labels(row_labels)
            built["label"] = pa.array(row_ids, pa.int32())
            for index, (label, label_id) in enumerate(zip(row_labels, row_ids, strict=True)):
                if label is not None and label_id is None and rejected[index] is None:
                    rejected[index] = "a label that no training row has"
        if "label_sets" in self.annotations_present:
            sets = [self._encode_labels(row or ()) for row in block["label_set"].to_pylist()]
            # Classes that training lacks cannot be learned; the others of the row can.
            known = [sorted({each for each in row if each is not None}) for row in sets]
            built["label_set"] = pa.array(known, pa.list_(pa.int32()))
        if "values" in self.annotations_present:
            built["value"] = block["value"].cast(pa.float32())
        return pa.table(built | {"rejected": pa.array(rejected, pa.string())})

    def schema(self, split: str) -> pa.Schema:
        """Return the columns of the shards of a split; unlabelled splits have no annotations."""
        full = super().schema(split)
        if split not in self.unlabelled_splits:
            return full
        absent = {"label", "label_set", "value", "captions", "caption_tokens", "symbols"}
        absent |= {"text"} if self.modality != CAPTION_MODALITY else set()
        return pa.schema([field for field in full if field.name not in absent])

    def preprocessing(self) -> dict[str, Any]:
        """Return reader, options and the constants of the media transforms."""
        # The folder of the media does not decide the bytes; its content is part of the sources.
        chosen = {k: v for k, v in to_dict(self.options).items() if k != "media"}
        return {"reader": type(self).name, **chosen, **self.modality_files.describe_constants()}

    def facts(self) -> dict[str, Any]:
        """Return names of classes and symbols, the scale of values, and how captions are used."""
        entries: dict[str, Any] = {"labels": list(self.labels)} if self._has_labels() else {}
        if self.value_scale is not None:
            entries |= {"value_scale": list(self.value_scale)}
        if "transcripts" in self.annotations_present:
            entries |= {"symbols": list(self.symbols), "blank": 0}
        if "captions" in self.annotations_present and self.captions_equivalent:
            entries |= {"queries": "all"}
        return entries

    def annotation_files(self) -> list[str]:
        """Return the files that hold rows; the manifest identifies them by their content."""
        return []

    def note_unread(self, entry: DirectoryEntry) -> DirectoryEntry:
        """Return a file of ``source``, noted if it holds annotations that are not read.

        Args:
            entry: a file that ``extra_sources`` or ``inspect`` finds.
        """
        return entry

    def describe_unread(self) -> str:
        """Return the files that were noted, with remedies; "" without any."""
        return ""

    def find_record(self) -> dict[str, Any]:
        """Return the fields of one record in the source, before the reader selects from them."""
        for file in self.annotation_files()[:1]:
            record = next(read_records(self.source, file), (None,))[-1]
            if not isinstance(record, dict) or all(isinstance(v, dict) for v in record.values()):
                record = next(read_json_entries(self.source, file), (None,))[-1]
            if isinstance(record, dict):
                return record
        return {}

    def num_source_files(self) -> int:
        """Return the number of annotation files."""
        return len(self.annotation_files()) or 1

    def extra_sources(self) -> list[dict[str, str]]:
        """Return annotation files by their content, and media by names and sizes.

        Hashing the content of all media would take as long as preparing them.
        """
        if self.source.is_file:
            digest = self.source.digest("")
            found = [{"file": to_printable(self.source.name), "sha256": digest}]
        else:
            files = sorted(self.annotation_files())
            known = set(files)
            found = [
                {"file": to_printable(name), "sha256": self.source.digest(name)} for name in files
            ]
            count, size, digest = digest_listing(
                self.note_unread(entry) for entry in self.source.walk() if entry.name not in known
            )
            if count:
                found.append({"file": f"{count} files, {size} bytes", "sha256": digest})
        media = getattr(self.options, "media", None)
        if media:
            count, size, digest = digest_listing(SourceDirectory(media).walk())
            found.append({"file": f"media: {count} files, {size} bytes", "sha256": digest})
        return found

    def _encode_labels(self, row_labels: Sequence[str | None]) -> list[int | None]:
        """Return the class ids of labels, None for unknown ones; ``1.0`` also names class ``1``."""
        names = {name: label_id for label_id, name in enumerate(self.labels)}
        values: dict[Any, int] = {}
        for name, label_id in names.items():
            values.setdefault(parse_label(name), label_id)
        ids = {
            label: None if label is None else names.get(label, values.get(parse_label(label)))
            for label in set(row_labels)
        }
        return [ids[label] for label in row_labels]

    def _encode_symbols(self, transcripts: Sequence[str | None]) -> pa.Array:
        # Id 0 is the CTC blank.
        ids = {symbol: symbol_id for symbol_id, symbol in enumerate(self.symbols, start=1)}
        unknown = ids.get(UNKNOWN_SYMBOL, 0)
        rows = [[ids.get(c, unknown) for c in text or ""] for text in transcripts]
        return pa.array(rows, pa.list_(pa.int32()))


def make_raw_schema(files: ModalityFiles, annotations: Sequence[str] = ()) -> pa.Schema:
    """Return the columns that ``rows`` yields after key, split and group.

    Absent values are null, or empty for captions.

    Args:
        files: raw files of the modality.
        annotations: see :attr:`ExternalCorpus.annotations_present`.
    """
    targets = [("label_set", pa.list_(pa.string()))] * ("label_sets" in annotations)
    targets += [("value", pa.float64())] * ("values" in annotations)
    return pa.schema(
        [
            *files.raw_fields(),
            ("label", pa.string()),
            *targets,
            ("captions", pa.list_(pa.string())),
            ("file", pa.string()),
            ("row", pa.int64()),
        ]
    )


def list_annotation_fields(annotations: Sequence[str]) -> list[tuple[str, pa.DataType]]:
    """Return the columns of shards after those of the modality.

    Args:
        annotations: see :attr:`ExternalCorpus.annotations_present`.
    """
    tokens = pa.list_(pa.int32())
    fields: list[tuple[str, pa.DataType]] = []
    if "transcripts" in annotations:
        fields += [("symbols", tokens), ("text", pa.string())]
    if "labels" in annotations:
        fields += [("label", pa.int32())]
    if "label_sets" in annotations:
        fields += [("label_set", tokens)]
    if "values" in annotations:
        fields += [("value", pa.float32())]
    if "captions" in annotations:
        fields += [("captions", pa.list_(pa.string())), ("caption_tokens", pa.list_(tokens))]
    return fields


def build_caption_columns(block: pa.Table, tokenizer: Any, options: CaptionOptions) -> ColumnArrays:
    """Return all captions of each row, truncated, and their tokens.

    Args:
        block: raw rows with a column ``captions``.
        tokenizer: tokenizer of the data directory.
        options: limits of captions.
    """
    longest = options.max_caption_characters
    captions = [[c[:longest] for c in row or ()] for row in block["captions"].to_pylist()]
    tokens = text.encode_captions(tokenizer, captions, options.max_caption_tokens)
    return {"captions": pa.array(captions, pa.list_(pa.string())), "caption_tokens": tokens}


#: Longer digit strings are sorted as texts: Python refuses to convert very long ones to numbers.
MAX_LABEL_DIGITS = 640
#: Largest value of a regression. Beyond it single precision is infinite.
MAX_VALUE = 1e38
#: ``007`` is a code, not a number. The exponent is short, so that values stay small.
_NUMBER = re.compile(r"[+-]?(0|[1-9][0-9]{0,639})(\.[0-9]{1,640})?([eE][+-]?[0-9]{1,3})?")
_BOOLEANS = {"true": Decimal(1), "false": Decimal(0)}


def parse_label(label: str) -> Decimal | str:
    """Return the value of a label: a number for ``1``, ``1.0`` and ``True``, else the text."""
    if _NUMBER.fullmatch(label):
        return Decimal(label)
    return _BOOLEANS.get(label.lower(), label)


def merge_equal_labels(labels: Collection[str]) -> list[str]:
    """Return one label per value: the shortest one, of equally long ones the first as text."""
    ordered = sorted(labels, key=lambda label: (len(label), label))
    chosen: dict[Decimal | str, str] = {}
    for label in ordered:
        chosen.setdefault(parse_label(label), label)
    return list(chosen.values())


def count_labels(labels: Iterable[str]) -> Counter[str]:
    """Return the number of rows by class; labels of equal value are one class."""
    counts = Counter(labels)
    names = {parse_label(name): name for name in merge_equal_labels(counts.keys())}
    merged = Counter[str]()
    for label, count in counts.items():
        merged[names[parse_label(label)]] += count
    return merged


def sort_labels(labels: Collection[str]) -> list[str]:
    """Return class names in the order of their ids: by value if all are numbers, else as texts.

    ``"1"`` and ``"01"`` have the same value. The text decides between them, so that every reading
    of a corpus gives the same order.
    """
    if all(label.isdecimal() and len(label) <= MAX_LABEL_DIGITS for label in labels):
        return sorted(labels, key=lambda label: (int(label), label))
    if all(_NUMBER.fullmatch(label) for label in labels):
        return sorted(labels, key=lambda label: (Decimal(label), label))
    return sorted(labels)


class RunningMoments:
    """Mean, deviation and range of numbers that are seen one by one (Welford 1962)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self._squares = 0.0
        self.low, self.high = math.inf, -math.inf

    def add(self, value: float) -> None:
        """Add a number."""
        self.count += 1
        step = value - self.mean
        self.mean += step / self.count
        self._squares += step * (value - self.mean)
        self.low, self.high = min(self.low, value), max(self.high, value)

    def scale(self, where: str) -> tuple[float, float]:
        """Return mean and deviation; the deviation of equal numbers counts as 1.

        Args:
            where: place of the rows, for the message.

        Raises:
            UserError: no number was added.
        """
        if not self.count:
            raise UserError(f"{where}: no training row has a value")
        return self.mean, (self._squares / self.count) ** 0.5 or 1.0


def read_number(value: Any) -> float:
    """Return the value of a regression.

    Args:
        value: a number, or a text with one.

    Raises:
        ValueError: it is no finite number; the text is the reason.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError("no number") from None
    # Shards hold the values in single precision.
    if not abs(number) <= MAX_VALUE:
        raise ValueError("no finite number")
    return number


def read_label_set(value: Any, separator: str) -> list[str]:
    """Return the labels of a row, without duplicates.

    Args:
        value: a list, or a text: a JSON list, or labels with a separator between them.
        separator: text between two labels.

    Raises:
        ValueError: the value is missing, or a label is no text; the text is the reason.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError("labels are no JSON list") from None
    if isinstance(value, str):
        value = [part for part in value.split(separator) if part.strip()] or None
    if not isinstance(value, list | tuple):
        raise ValueError("no labels" if value is None else "labels are no list")
    if any(isinstance(each, list | dict) or each is None for each in value):
        raise ValueError("labels are no list of texts")
    return list(dict.fromkeys(str(each).strip() for each in value))


def describe_numeric_labels(labels: Collection[str]) -> str | None:
    """Return a sentence that labels are numbers and what to do, or None if they are not.

    Args:
        labels: class names.
    """
    if not labels or not all(_NUMBER.fullmatch(label) for label in labels):
        return None
    ordered = sort_labels(labels)
    return (
        f"the labels are numbers, {len(labels)} values from {ordered[0]} to {ordered[-1]}. Each "
        "value is a class, and classes have no order. If they are the target of a regression, set "
        "the option task of the corpus: values"
    )
