"""Tables whose rows are predicted: the files and folders that ``skillnet prepare`` reads.

    rows.csv, .tsv, .json, .parquet, .jsonl     one file of rows; also compressed (.gz), and URIs
    a folder                                    any format of ``skillnet prepare``, without labels

:class:`RowTable` yields the rows one by one, so that memory does not grow with the file.
:mod:`pipelines.serving.table_prediction` answers them.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.data.corpora import (
    ExternalCorpus,
    detect_reader,
    explain_unread,
    open_external_corpus,
)
from pipelines.data.corpora.base import RejectedRow
from pipelines.data.corpora.formats.encoding import BadRecord
from pipelines.data.corpora.formats.record_reader import read_parquet_rows, read_records
from pipelines.data.corpora.readers.base import FileRecord
from pipelines.data.io.directory import OversizedInputError, SourceDirectory, iter_lines
from pipelines.data.io.media import CELLS_PER_BATCH, MediaReadError, MediaRef, read_media
from pipelines.data.io.source_file import open_stream
from pipelines.data.transforms.text import check_unicode
from pipelines.serving.answer_files import infer_schema
from pipelines.serving.inputs import (
    EXPECTED_ROW,
    InputFields,
    InputRow,
    PredictionItem,
    find_table_format,
    parse_input_line,
    parse_table_row,
    read_file_bytes,
)
from skillnet.modality import find_modality
from skillnet_platform.errors import UserError
from skillnet_platform.storage.location import Location, join_location

if TYPE_CHECKING:
    import pyarrow as pa

#: Rows whose types are found at once, and rows of a Parquet file that are read at once.
TYPED_ROWS, ROWS_PER_BATCH = 1000, 256
#: Hashes a part of the input, and returns it.
Hasher = Callable[[bytes], bytes]


@dataclass
class RowTable:
    """Rows of a file or of a folder.

    Args:
        where: path or URI.
        task: for rows that do not name one.
        fields: columns that the user names.
    """

    where: Location
    task: str | None = None
    fields: InputFields = field(default_factory=InputFields)

    def __post_init__(self) -> None:
        self.source = SourceDirectory(str(self.where))
        #: Format of the file; None for a folder.
        self.format = None
        if self.source.is_file:
            self.format = find_table_format(self.source.name) or "jsonl"

    @property
    def is_line_file(self) -> bool:
        """Whether each line is a row, so that a message can name it before it is parsed."""
        return self.format == "jsonl" and not self.source.name.lower().endswith((".json", ".gz"))

    def count_rows(self) -> int | None:
        """Return the number of rows; None if only reading them tells it."""
        if self.format != "parquet":
            return None
        import pyarrow.parquet as pq

        try:
            with self.source.open() as stream:
                return int(pq.ParquetFile(stream).metadata.num_rows)
        except (ValueError, OSError):  # reading it says what is wrong
            return None

    def read(self, see: Hasher = bytes) -> Iterator[InputRow]:
        """Yield all rows; an unusable one has its reason.

        Args:
            see: called with the bytes of each row and of its file.

        Raises:
            UserError: the file is missing, or no format reads the folder.
        """
        if self.format is None:
            return self._read_folder(see)
        return self._read_lines(see) if self.is_line_file else self._read_records(see)

    def find_schema(self) -> "pa.Schema":
        """Return the columns of all rows with their types; reads the rows unless a header has them.

        Raises:
            UserError: a column mixes kinds of values.
        """
        import pyarrow as pa

        if self.format == "parquet":
            import pyarrow.parquet as pq

            try:
                with self.source.open() as stream:
                    # Metadata of the writer, such as that of pandas, name its columns alone.
                    return pq.ParquetFile(stream).schema_arrow.remove_metadata()
            except (pa.ArrowException, UnicodeDecodeError):
                raise UserError(f"{self.where}: not a Parquet file, or a damaged one") from None
        rows = self._list_values()
        if self.format in ("csv", "tsv"):
            rows = islice(rows, 1)
        schema = pa.schema([])
        while some := [*islice(rows, TYPED_ROWS)]:
            try:
                found = infer_schema(some)
                schema = pa.unify_schemas([schema, found], promote_options="permissive")
            except (pa.ArrowException, OverflowError) as error:
                raise UserError(
                    f"{self.where}: a column mixes kinds of values ({error}), which the output "
                    "cannot hold. Write JSON lines: --output NAME.jsonl"
                ) from None
        return schema

    def _list_values(self) -> Iterator[dict[str, Any]]:
        """Yield the columns of all readable rows, without a look at the files that they name."""
        if self.format is not None:
            yield from (each for _, each in read_records(self.source, "") if isinstance(each, dict))
            return
        for record in self._open_corpus().read_records():
            if not isinstance(record, RejectedRow) and not isinstance(record.value, BadRecord):
                yield _list_columns(record)

    def _read_lines(self, see: Hasher) -> Iterator[InputRow]:
        name, read_file = str(self.where), self._file_reader(see)
        with open_stream(self.source.uri) as stream:
            number = 0
            try:
                for number, line in iter_lines(stream):
                    if number == 1 and line.lstrip().startswith(b"["):
                        raise UserError(
                            f"{name}: a JSON array; expected one object per line. Convert it: "
                            f"jq -c '.[]' {name}, or name it .json"
                        )
                    yield parse_input_line(
                        name, number, see(line), read_file, self.task, False, self.fields
                    )
            except OversizedInputError as error:
                raise UserError(f"{name}: line {number + 1}: {error}") from None

    def _read_records(self, see: Hasher) -> Iterator[InputRow]:
        name, read_file = str(self.where), self._file_reader(see)
        unit = "row" if self.format == "parquet" else "line"
        for number, record in self._list_records():
            see(encode_record(record))
            where, place = f"{name}, {unit} {number}", {"source": name, "line": number}
            yield parse_record(record, where, place, read_file, self.task, self.fields)

    def _list_records(self) -> Iterator[tuple[int, Any]]:
        if self.format != "parquet":
            return read_records(self.source, "")
        # Media are large, and a batch is in memory at once.
        has_media = any("binary" in str(each) for each in self.find_schema().types)
        return read_parquet_rows(self.source, "", CELLS_PER_BATCH if has_media else ROWS_PER_BATCH)

    def _read_folder(self, see: Hasher) -> Iterator[InputRow]:
        corpus = self._open_corpus()
        modality = find_modality(corpus.modality)
        for record in corpus.read_records():
            if isinstance(record, RejectedRow):
                place = {"source": record.file or record.key, "line": record.row}
                yield InputRow(f"{self.where}/{record.key}", place, None, record.reason)
                continue
            where = f"{self.where}/{record.file}"
            place = {"source": record.file, "line": record.number}
            if record.number is not None:
                where += f", line {record.number}"
            if isinstance(record.value, BadRecord):
                yield _reject_record(record.value, where, place)
                continue
            values = _list_columns(record)
            see(encode_record(values))
            try:
                row = corpus.build_record(record._replace(key=record.key or "0"))
                item = self._make_folder_item(row, modality, where, see)
            except ValueError as error:
                yield InputRow(where, place, None, str(error), values=values)
                continue
            yield InputRow(where, place, item, values=values)

    def _open_corpus(self) -> ExternalCorpus:
        found = detect_reader(self.source)
        if found is None:
            why = explain_unread(self.source) or "no format of `skillnet prepare` reads it"
            raise UserError(f"{self.where}: {why}")
        chosen = {"text": self.fields.text, "file": self.fields.file}
        options = {key: value for key, value in chosen.items() if value is not None}
        corpus = open_external_corpus("input", f"{found[0]}:{self.source.uri}", options)
        # Predictions need no labels, and rows without them are rows.
        corpus.annotations_present = ()
        return corpus

    def _make_folder_item(
        self, row: Mapping[str, Any], modality: Any, where: str, see: Hasher
    ) -> PredictionItem:
        if modality.reads_tokens:
            made = modality.file_half.make_input(row[modality.content_column], where)
            return PredictionItem(**made, task=self.task, modality=modality.name)
        (data,) = read_media([row["media"]])
        if isinstance(data, MediaReadError):
            raise UserError(data.reason)
        if not data:
            raise UserError("the file is empty")
        name = str(MediaRef(**row["media"]))
        return PredictionItem(name, None, see(data), self.task, modality=modality.name)

    def _file_reader(self, see: Hasher) -> Callable[[str], bytes]:
        text = str(self.where)
        folder: Location = text.rpartition("/")[0] if "://" in text else Path(text).parent

        def read_file(name: str) -> bytes:
            return see(read_file_bytes(str(join_location(folder, name))))

        return read_file


def parse_record(
    record: Any,
    where: str,
    place: dict[str, Any],
    read_file: Callable[[str], bytes],
    task: str | None,
    fields: InputFields,
) -> InputRow:
    """Return a record of a table as a row; an unusable row has its reason.

    Args:
        record: column -> value, or why the record cannot be read.
        where: position in messages.
        place: fields that join an answer with the row.
        read_file: returns the content for the name of a file.
        task: for rows that do not name one.
        fields: columns that the user names.

    Raises:
        UserError: the rest of the file cannot be read.
    """
    place = {"id": record["id"]} | place if isinstance(record, dict) and "id" in record else place
    if isinstance(record, BadRecord):
        return _reject_record(record, where, place)
    try:
        for value in record.values():
            if isinstance(value, str):
                check_unicode(value)
        item = parse_table_row(record, read_file, where, task, fields)
    except ValueError as error:
        return InputRow(where, place, None, str(error), values=record)
    return InputRow(where, place, item, values=record)


def _reject_record(record: BadRecord, where: str, place: dict[str, Any]) -> InputRow:
    # One rejected row would stand for an unknown number of lost ones.
    if record.truncates_file:
        raise UserError(f"{where}: {record.reason}. Correct the file")
    reason = EXPECTED_ROW if record.reason == "not a JSON object" else record.reason
    return InputRow(where, place, None, reason, values={})


def encode_record(record: Any) -> bytes:
    """Return bytes that change with a record.

    Args:
        record: column -> value, or why the record cannot be read.
    """

    def digest(value: Any) -> str:
        data = value if isinstance(value, bytes) else repr(value).encode("utf-8", "replace")
        return hashlib.sha256(data).hexdigest()

    return json.dumps(record, default=digest, ensure_ascii=True).encode()


def _list_columns(record: FileRecord) -> dict[str, Any]:
    """Return the columns of a record that files of rows can hold; a file has its name."""
    if record.value is None:
        return {"file_name": record.file}
    plain = (str, int, float, bool, bytes, list, dict, type(None))
    return {name: value for name, value in record.value.items() if isinstance(value, plain)}
